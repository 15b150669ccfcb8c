"""Instructions from captions and boxes: asked of a writer, read as a talk, and never twice for what is known."""

# ruff: noqa: RUF001 (talks in many scripts)

import base64
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bridgework.config import config_class as bridgework_spec
from bridgework.curation import conversation_parser, llm
from bridgework.curation.instruct import DESCRIBE, Instruct
from bridgework.curation.runner import make
from bridgework.data.dataset import open_dataset
from bridgework.data.samples import Box, Part, Sample, pair
from bridgework.data.tokenization import load_tokenizer
from bridgework.errors import DataError, RunError, SpecError, WeightsError
from tests.curation.models import Scripted, completion, decided, endpoint, judged, writer
from tests.curation.support import flags, written

FLAGS = list(flags())
KINDS = tuple(conversation_parser.KINDS)
GOOD = {
    "conversation": "Question: What is it?\nAnswer: A flag.\nQuestion: Which colors?\nAnswer: Red and blue.",
    "detail": "The picture shows a flag of two colors. " * 6,
    "reasoning": "Question: Where does it belong?\nAnswer: "
    + "It may belong to a ship, as flags of this kind do. " * 3,
}


def kind_of(request: dict[str, Any]) -> str:
    """Which kind a request asks for, by what only its prompt says."""
    told = request["messages"][0]["content"]
    return (
        "conversation"
        if "three to six questions" in told
        else "reasoning"
        if "step by step" in told
        else "detail"
    )


def good(request: dict[str, Any]) -> str:
    return GOOD[kind_of(request)]


def spec(server: Scripted, **fields: Any) -> Instruct:
    return Instruct(endpoint=server.url, model="writer-1", **fields)


def turns(sample: Sample) -> list[str | int]:
    return [
        part.text.strip("\n") if part.text is not None else part.image or 0 for part in sample.parts
    ]


# --- what a talk is --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_examples_can_be_parsed(kind: str) -> None:
    """Every prompt holds two or three, and each reads as a talk of its kind."""
    with endpoint(good) as server:
        judged(spec(server, kinds=(kind,)), FLAGS[:1], Path())
    (request,) = server.asked
    shown = [
        message["content"] for message in request["messages"] if message["role"] == "assistant"
    ]
    assert 2 <= len(shown) <= 3 and all(
        conversation_parser.parse(example, kind) for example in shown
    )
    assert [m["role"] for m in request["messages"]] == [
        "system",
        *["user", "assistant"] * len(shown),
        "user",
    ]


@pytest.mark.parametrize(
    ("kind", "raw", "fault"),
    [
        ("conversation", " ", "it is empty"),
        ("detail", "", "it is empty"),
        (
            "conversation",
            "Question: a?\nQuestion: b?\nAnswer: c.",
            "questions and answers do not alternate",
        ),
        (
            "conversation",
            "Sure!\n" + GOOD["conversation"],
            "questions and answers do not alternate",
        ),
        (
            "conversation",
            GOOD["conversation"] + "\nQuestion: More?",
            "questions and answers do not alternate",
        ),
        ("conversation", "Question: What?\nAnswer: A flag.", "too few or too many questions"),
        (
            "conversation",
            GOOD["conversation"].replace("A flag.", "The caption says a flag."),
            "it tells on its source",
        ),
        ("conversation", GOOD["conversation"].replace("blue.", "blue, with"), "it breaks off"),
        ("detail", "A flag.", "too short or too long"),
        ("detail", "word " * 500 + ".", "too short or too long"),
        ("detail", GOOD["detail"] + "From the given text one knows it.", "it tells on its source"),
        (
            "detail",
            GOOD["detail"] + "It lies at [0.10, 0.25, 0.30, 0.40].",
            "it tells on its source",
        ),
        ("detail", GOOD["detail"] + "\nQuestion: What?", "questions and answers do not alternate"),
        (
            "reasoning",
            GOOD["reasoning"] + "\n" + GOOD["reasoning"],
            "too few or too many questions",
        ),
        (
            "reasoning",
            "Question: " + "why " * 80 + "?\nAnswer: " + "So. " * 40,
            "too short or too long",
        ),
    ],
)
def test_invalid_answer_is_rejected_with_a_reason(kind: str, raw: str, fault: str) -> None:
    with pytest.raises(DataError, match=fault):
        conversation_parser.parse(raw, kind)


def test_marks_around_the_speakers_and_lines_within_an_answer_are_read() -> None:
    raw = "**Question 1:** What is it?\n**Answer:** A flag.\nIt waves.\n\n## Question: Why?\nANSWER: Wind."
    assert conversation_parser.parse(raw, "conversation") == [
        ("What is it?", "A flag.\nIt waves."),
        ("Why?", "Wind."),
    ]


TALKS = {
    "Chinese": ("这是什么？", "一栋房子。", "什么颜色？", "它是红色的。"),
    "Chinese in quotes": (
        "牌子上写着什么？",
        "写着\u201c停\u201d。",
        "颜色？",
        "他说\u300c红色。\u300d",
    ),
    "Japanese": ("何ですか？", "家です。", "何色ですか？", "赤です！"),
    "Hindi": ("यह क्या है?", "एक घर।", "रंग?", "यह लाल है।"),
    "Bengali": ("এটা কী?", "একটি বাড়ি।", "রং?", "এটি লাল।"),
    "Arabic": ("ما هذا؟", "إنه بيت.", "ما لونه؟", "هل هو أحمر؟"),
    "Urdu": ("یہ کیا ہے؟", "ایک گھر۔", "رنگ؟", "یہ لال ہے۔"),
    "Thai": ("นี่คืออะไร", "บ้าน", "สีอะไร", "สีแดงครับ"),
    "Burmese": ("ဒါဘာလဲ။", "အိမ်။", "အရောင်?", "အနီ။"),
    "Khmer": ("នេះជាអ្វី?", "ផ្ទះ។", "ពណ៌?", "ក្រហម។"),
    "Armenian": ("Ի՞նչ է սա։", "Տուն։", "Գույնը՞", "Կարմիր է։"),
    "Amharic": ("ይህ ምንድነው?", "ቤት ነው።", "ቀለሙ?", "ቀይ ነው።"),
    "Korean": ("무엇입니까?", "집입니다.", "색은?", "빨간색입니다."),
    "Hebrew": ("מה זה?", "בית.", "צבע?", "אדום."),
    "English with an emoji": ("What?", "A house.", "Color?", "It is red. \U0001f642"),
}


@pytest.mark.parametrize("language", TALKS)
@pytest.mark.parametrize("labels", [("Question: ", "Answer: "), ("Question\uff1a", "Answer\uff1a")])
def test_conversation_is_complete_in_any_script(language: str, labels: tuple[str, str]) -> None:
    said = TALKS[language]
    raw = "\n".join(f"{labels[n % 2]}{text}" for n, text in enumerate(said))
    assert conversation_parser.parse(raw, "conversation") == [
        (said[0], said[1]),
        (said[2], said[3]),
    ]


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("问题：", "回答："),
        ("问：", "答："),
        ("質問: ", "回答: "),
        ("प्रश्न: ", "उत्तर: "),
        ("질문 1: ", "답변 1: "),
    ],
)
def test_speaker_labels_may_be_in_the_language_of_the_text(question: str, answer: str) -> None:
    raw = f"{question}什么？\n{answer}房子。\n{question}颜色？\n{answer}红色。"
    assert conversation_parser.parse(raw, "conversation") == [
        ("什么？", "房子。"),
        ("颜色？", "红色。"),
    ]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("画面中央有一栋红色的房子。" * 12, None),
        ("画面中央有一栋红色的房子。" * 12 + "房子的前面", "it breaks off"),
        ("画面中央。", "too short or too long"),
        ("画面中央有一栋红色的房子。" * 80, "too short or too long"),
        ("ภาพนี้แสดงบ้านสีแดงหลังใหญ่ที่มีสวนอยู่ด้านหน้า " * 4, None),
        ("इस चित्र में एक लाल घर है जिसके सामने एक बगीचा है। " * 4, None),
        ("इस चित्र में एक लाल घर है जिसके सामने एक बगीचा " * 4, "it breaks off"),
    ],
)
def test_a_description_is_as_long_in_any_script(text: str, fault: str | None) -> None:
    if fault is None:
        assert conversation_parser.parse(text, "detail") == [("", text.strip())]
    else:
        with pytest.raises(DataError, match=fault):
            conversation_parser.parse(text, "detail")


@pytest.mark.parametrize(
    ("answer", "tells"),
    [
        ("The text says STOP in white letters.", False),
        ("A caption in bold letters.", False),
        ("There is a caption below the drawing.", False),
        ("The GPS shows coordinates near Paris.", False),
        ("The caption says a flag.", True),
        ("The second caption mentions a flag.", True),
        ("According to the captions it is a flag.", True),
        ("Based on the given text, it is a flag.", True),
        ("In the captions a flag is named.", True),
        ("The captions provided name a flag.", True),
        ("The description mentions a flag.", True),
        ("The bounding box is wide.", True),
        ("The coordinates place it on the left.", True),
    ],
)
def test_references_to_captions_are_rejected_but_not_to_text_in_the_image(
    answer: str, tells: bool
) -> None:
    raw = f"Question: What is there?\nAnswer: {answer}\nQuestion: Why?\nAnswer: Wind."
    if tells:
        with pytest.raises(DataError, match="it tells on its source"):
            conversation_parser.parse(raw, "conversation")
    else:
        assert conversation_parser.parse(raw, "conversation")[0][1] == answer


# --- what is asked ---------------------------------------------------------------------------------------------------


def test_neighbors_with_the_same_picture_are_asked_about_once_with_all_their_captions(
    home: Path,
) -> None:
    image, box = FLAGS[0].images[0], Box(0, (0.0, 0.0, 0.5, 1.0), "stripe")
    rows = [
        pair(f"a{n}", image, text, boxes=(box,))
        for n, text in enumerate(("one", "two  words", "one"))
    ]
    with endpoint(good) as server:
        facts = judged(spec(server), [*rows, FLAGS[1]], home)
    assert [sorted(fact) for fact in facts] == [
        ["answers", "captions", "image"],
        *[["image"]] * 2,
        [*sorted(facts[0])],
    ]
    assert facts[0]["captions"] == 2 and facts[0]["answers"] == {
        kind: [GOOD[kind].strip()] for kind in KINDS
    }
    assert len(server.asked) == 6
    known = {
        kind_of(r): r["messages"][-1]["content"]
        for r in server.asked
        if "words" in r["messages"][-1]["content"]
    }
    assert known["conversation"] == "one\ntwo words"
    assert (
        known["detail"]
        == known["reasoning"]
        == "one\ntwo words\nthings: stripe [0.00, 0.00, 0.50, 1.00]"
    )


def test_a_request_says_how_to_draw_and_carries_the_key(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WRITER_KEY", "sesame")
    with endpoint(good) as server:
        judged(
            spec(server, key="WRITER_KEY", temperature=0.25, max_tokens=99, kinds=("detail",)),
            FLAGS[:2],
            home,
        )
        judged(spec(server, seed=1, kinds=("detail",)), FLAGS[:1], home)
    first = server.asked[0]
    assert (first["model"], first["temperature"], first["max_tokens"]) == ("writer-1", 0.25, 99)
    assert len({request["seed"] for request in server.asked}) == 3
    assert server.keys[0] == "Bearer sesame" and server.keys[2] == "Bearer none"
    assert all(
        isinstance(message["content"], str)
        for request in server.asked
        for message in request["messages"]
    )


def test_image_is_sent_only_with_show(home: Path) -> None:
    with endpoint(good) as server:
        judged(spec(server, show=True, kinds=("detail",)), FLAGS[:1], home)
    text, shown = server.asked[0]["messages"][-1]["content"]
    kind, _, data = shown["image_url"]["url"].partition(",")
    assert text["text"] == FLAGS[0].text and kind == "data:image/png;base64"
    assert base64.b64decode(data) == FLAGS[0].images[0]


def test_concurrent_requests_are_limited(home: Path) -> None:
    three = threading.Barrier(3, timeout=60)

    def together(request: dict[str, Any]) -> str:
        three.wait()
        return good(request)

    with endpoint(together) as server:
        judged(spec(server, parallel=3, kinds=("detail",)), FLAGS[:12], home)
    assert server.at_once == 3 and len(server.asked) == 12


# --- when it goes wrong ----------------------------------------------------------------------------------------------


def test_invalid_answer_is_requested_once_again_then_dropped(home: Path) -> None:
    first = set[str]()

    def answer(request: dict[str, Any]) -> str:
        known = request["messages"][-1]["content"]
        again = known in first
        first.add(known)
        return (
            good(request)
            if known == FLAGS[0].text or (again and known == FLAGS[1].text)
            else "The caption says so."
        )

    with endpoint(answer) as server:
        curation = spec(server, kinds=("detail",), parallel=1)
        facts = judged(curation, FLAGS[:3], home)
    assert [len(fact["answers"]["detail"]) for fact in facts] == [1, 2, 2] and len(
        server.asked
    ) == 5
    assert len({request["seed"] for request in server.asked}) == 5
    verdicts = decided(curation, FLAGS[:3], facts)
    assert [v.why for v in verdicts] == ["kept", "kept", "no answer to use: it tells on its source"]
    assert [s.provenance["instruct.answer"] for v in verdicts for s in v.samples] == ["1", "2"]


def test_a_busy_endpoint_is_asked_again_and_a_refused_request_has_no_answer(home: Path) -> None:
    statuses = iter([503, 429, 500])
    lock = threading.Lock()

    def answer(request: dict[str, Any]) -> str | int:
        if request["messages"][-1]["content"] == FLAGS[1].text:
            return 400
        with lock:
            return next(statuses, 0) or good(request)

    with endpoint(answer) as server:
        curation = spec(server, kinds=("detail",))
        facts = judged(curation, FLAGS[:2], home)
    assert facts[0]["answers"]["detail"] == [GOOD["detail"].strip()]
    assert facts[1]["answers"]["detail"] == ["", ""]
    whys = [v.why for v in decided(curation, FLAGS[:2], facts)]
    assert whys == ["kept", "no answer to use: it is empty"]


def test_empty_answer_is_requested_once_again_then_dropped(home: Path) -> None:
    with endpoint(lambda request: completion(None)) as server:
        curation = spec(server, kinds=("detail",))
        facts = judged(curation, FLAGS[:1], home)
    assert facts[0]["answers"]["detail"] == ["", ""] and len(server.asked) == 2
    assert [v.why for v in decided(curation, FLAGS[:1], facts)] == ["no answer to use: it is empty"]


@bridgework_spec
class Impatient(Instruct):
    """Asks twice, and does not wait for half a minute."""

    def _writer(self) -> llm.ChatModel:
        return llm.ChatEndpoint(self.endpoint or "", self.model or "", attempts=2, parallel=2)


def test_malformed_completions_are_not_stored_and_the_run_resumes(
    home: Path, tmp_path: Path
) -> None:
    source, dest = written(tmp_path / "source", FLAGS[:24]), str(tmp_path / "made")
    broken = FLAGS[9].text  # in the second row group of the first shard

    def answer(request: dict[str, Any]) -> str | bytes:
        return (
            b'{"choices": null}' if request["messages"][-1]["content"] == broken else good(request)
        )

    with endpoint(answer) as server:
        curation = Impatient(endpoint=server.url, model="m", kinds=("detail",))
        with pytest.raises(RunError, match="answers with no chat completion"):
            make(curation, [source], dest, home=home, say=str)
        first = len(server.asked)
        server.answer = good
        made = make(curation, [source], dest, home=home, say=str)
    assert made.parameters["counts"] == {"kept": 24}
    again = [request["messages"][-1]["content"] for request in server.asked[first:]]
    assert sorted(again) == sorted(
        flag.text for flag in FLAGS[8:24]
    )  # the first row group was kept


def test_invalid_image_is_quarantined_and_row_without_caption_dropped(home: Path) -> None:
    torn = pair("torn", FLAGS[0].images[0][:40], "a torn flag")
    bare = Sample("bare", FLAGS[1].images, (Part("caption", image=0),))
    with endpoint(good) as server:
        curation = spec(server)
        facts = judged(curation, [torn, bare], home)
    assert facts[0]["bad"][0] == "corrupt" and not server.asked
    assert [v.why for v in decided(curation, [torn, bare], facts)] == [
        "no answer to use: no caption to write from"
    ]


# --- what comes out --------------------------------------------------------------------------------------------------


def test_every_kind_becomes_a_conversation_about_the_image(home: Path) -> None:
    with endpoint(good) as server:
        curation = spec(server)
        (verdict,) = decided(curation, FLAGS[:1], judged(curation, FLAGS[:1], home))
    made = {sample.key.rpartition("/")[2]: sample for sample in verdict.samples}
    assert list(made) == list(KINDS)
    said = [item for item in turns(made["conversation"]) if item != 0]
    assert said == ["What is it?", "A flag.", "Which colors?", "Red and blue."]
    assert [part.role for part in made["conversation"].parts if part.text] == [
        "user",
        "assistant",
    ] * 2
    question, answer = (item for item in turns(made["detail"]) if item != 0)
    assert question in DESCRIBE and answer == GOOD["detail"].strip()
    told = made["reasoning"].provenance
    assert told["instruct.kind"] == "reasoning" and told["instruct.model"] == "writer-1"


def test_image_is_before_or_after_the_first_question_equally_often(home: Path) -> None:
    with endpoint(good) as server:
        curation = spec(server, kinds=("conversation",))
        verdicts = decided(curation, FLAGS, judged(curation, FLAGS, home))
    first = [v.samples[0].parts[0].image is not None for v in verdicts]
    assert 16 <= sum(first) <= 40
    for v, before in zip(verdicts, first, strict=True):
        one, two = v.samples[0].parts[:2]
        assert (two.text or "")[:1] == "\n" if before else (one.text or "")[-1:] == "\n"
    assert [v.samples[0].parts for v in verdicts] == [v.samples[0].parts for v in decided(
        curation, FLAGS, [{"image": str(n), "captions": 1, "answers": {"conversation": [GOOD["conversation"]]}}
                          for n in range(len(FLAGS))])]  # fmt: skip


def test_deciding_again_sends_no_request(home: Path, tmp_path: Path) -> None:
    coco = [pair(f"{f.key}#{n}", f.images[0], f"{f.text} {n}") for f in FLAGS[:8] for n in range(5)]
    source, dest = written(tmp_path / "source", coco), str(tmp_path / "made")
    with endpoint(good) as server:
        curation = spec(server, kinds=("conversation", "detail"))
        made = make(curation, [source], dest, home=home, say=str)
        asked = len(server.asked)
        (tmp_path / "made").rename(tmp_path / "first")
        again = make(replace(curation, parallel=2), [source], dest, home=home, say=str)
    assert len(server.asked) == asked and again.rows == made.rows == 16
    # row groups of 8: the border parts four of the eight pictures, which are asked about in both
    assert asked == 2 * 12 and made.parameters["counts"] == {
        "asked about with the row before it": 32,
        "kept": 8,
    }
    images = [sample.images for sample in open_dataset(dest).samples()]
    assert len(images) == 2 * len(set(images))


def test_another_model_at_the_same_dest_is_rejected_with_both_names(
    home: Path, tmp_path: Path
) -> None:
    source, dest = written(tmp_path / "source", FLAGS[:4]), str(tmp_path / "made")
    with endpoint(good) as server:
        make(spec(server, kinds=("detail",)), [source], dest, home=home, say=str)
    with pytest.raises(
        DataError, match=r"with `endpoint=http://127.*/v1`; expected `endpoint=http://x/v1`"
    ):
        make(
            Instruct(endpoint="http://x/v1", model="writer-1", kinds=("detail",)),
            [source],
            dest,
            home=home,
        )
    both = "made with `endpoint=http.* lm=none model=writer-1`; expected `endpoint=none lm=/nope model=none`"
    with pytest.raises(DataError, match=both):
        make(Instruct(lm="/nope", kinds=("detail",)), [source], dest, home=home)


# --- a model on this machine -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A chat model in a folder: 260 bytes, two layers, random weights."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = load_tokenizer("bytes")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=8192, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_local_model_matches_transformers(llama: str) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "hello"}]
    asked = "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    tokenizer, model = load_tokenizer(llama), LlamaForCausalLM.from_pretrained(llama)
    ids = tokenizer(asked, return_tensors="pt", add_special_tokens=False).input_ids
    for _ in range(12):  # greedy, by hand
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    greedy = tokenizer.decode(ids[0, -12:], skip_special_tokens=True).strip()
    assert llm.LocalChatModel(llama, max_tokens=12)(messages, 0) == greedy
    drawn = llm.LocalChatModel(llama, max_tokens=12, temperature=1.0)
    assert drawn(messages, 1) == drawn(messages, 1) != drawn(messages, 2)


def test_trained_stage_generates_too(home: Path) -> None:
    asked = llm.LocalChatModel(writer(home), max_tokens=6, temperature=1.0)
    messages = [{"role": "user", "content": "hello"}]
    assert asked(messages, 3) == asked(messages, 3) != asked(messages, 4)


def test_meaningless_answers_of_a_local_model_are_dropped(llama: str, home: Path) -> None:
    curation = Instruct(lm=llama, kinds=("detail",), max_tokens=8)
    facts = judged(curation, FLAGS[:2], home)
    assert all(len(fact["answers"]["detail"]) == 2 for fact in facts)
    whys = {v.why for v in decided(curation, FLAGS[:2], facts)}
    assert whys == {"no answer to use: too short or too long"}
    digests = curation.models(home)
    assert digests["lm"] == llm.digest(llama) and len(digests["prompts"]) == 64
    assert Instruct(lm=llama, kinds=("reasoning",)).models(home)["prompts"] != digests["prompts"]


def test_folder_without_a_model_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="holds no language model"):
        Instruct(lm=str(tmp_path)).models(tmp_path)


@pytest.mark.parametrize(
    ("make_one", "words"),
    [
        (lambda: Instruct(), "give endpoint=URL and model=NAME, or lm=FOLDER"),
        (lambda: Instruct(endpoint="http://x"), "give endpoint=URL and model=NAME"),
        (lambda: Instruct(endpoint="http://x", model="m", lm="folder"), "or lm=FOLDER"),
        (lambda: Instruct(lm="folder", show=True), "an lm reads text only"),
        (
            lambda: Instruct(lm="folder", kinds=("details",)),
            "no kind 'details'; did you mean 'detail'",
        ),
        (lambda: Instruct(lm="folder", kinds=()), "kinds are one or more, each once. Got none"),
        (lambda: Instruct(lm="folder", parallel=0), "parallel are at least 1"),
    ],
)
def test_invalid_instruct_fields_are_rejected(make_one: Callable[[], Instruct], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        make_one()
