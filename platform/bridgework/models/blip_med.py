"""MED, BLIP's mixture of encoder and decoder: one set of weights, three modes (Li et al. 2022, arXiv:2201.12086, 3.1).

The text is read alone, read together with an image ([ENC] first), or written about an image ([DEC] first). Where the
model answers questions, what has no label is the question, which the encoder reads with the image; the decoder then
attends to the encoder alone (4.3).

Parts of MED's module: its outputs, its heads, and what stands between it and transformers.

The module of MED: a vision tower and BERT in three modes. A row of ids has no places: every sample has one image.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from types import SimpleNamespace
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import normalize
from transformers import LogitsProcessorList, SuppressTokensLogitsProcessor
from transformers.generation.streamers import BaseStreamer

from bridgework import rng
from bridgework.config import added, config_class
from bridgework.errors import DataError, SpecError, WeightsError
from bridgework.losses.matching import FLOOR, group_by_sample, matching_pairs
from bridgework.models import encoder_decoder
from bridgework.models.base import PairModelConfig, VLMModule
from bridgework.models.blip_text import MEDTextConfig, TextModules
from bridgework.models.blip_vit import BlipViT, BlipViTConfig
from bridgework.models.momentum_encoder import Keys, MomentumConfig, MomentumEncoder
from bridgework.models.origin import Origin
from bridgework.models.vision import remap_state_dict
from bridgework.system import IGNORE

Task = Literal["contrast", "match", "caption", "answer"]


@config_class
class MEDConfig(PairModelConfig):
    """A vision tower and the text side, with the parts that its tasks need.

    A captioner beside an encoder shares its weights (3.2); alone, and where it answers, it has them to itself, as in
    the release's fine-tunes.
    """

    vision: BlipViTConfig
    text: MEDTextConfig
    tasks: tuple[Task, ...] = ("contrast", "match", "caption")
    embed: int = 256
    momentum: MomentumConfig | None = None  # the twin that momentum contrast needs
    origin: Origin | None = added(default=None)  # of an import: fields that an export writes again

    def __post_init__(self) -> None:
        if not self.tasks or {"caption", "answer"} <= set(self.tasks):
            raise SpecError(
                f"tasks are one or more, and either caption or answer, got {self.tasks}"
            )
        if "contrast" not in self.tasks and ("match" in self.tasks or self.momentum is not None):
            raise SpecError(
                "hard negatives and a momentum twin need the vectors of 'contrast': add it to tasks"
            )
        if "answer" in self.tasks and self.vision.width != self.text.width:
            raise SpecError(
                f"an answer is written from what the encoder read: vision.width {self.vision.width} must be "
                f"text.width {self.text.width}"
            )

    def unshardable(self, requested: frozenset[str]) -> str:
        return "a MED's encoder, decoder and momentum twin share weights, which every worker needs complete"

    @property
    def tokenizer(self) -> str:
        return self.text.tokenizer

    @property
    def context(self) -> int:
        return self.text.context

    @property
    def pretrained(self) -> tuple[str, ...]:
        """The twin too need not be kept: it begins as a copy of what it follows."""
        vision = () if self.vision.weights is None else ("vision.*",)
        return vision if self.momentum is None else (*vision, "momentum.*")

    def build(self, *, pretrained: bool = True) -> "MED":
        """The model in float32; without weights (or with `pretrained=False`) drawn from torch's generator."""
        texts = self.text.build(
            self.vision.feature_width,
            reads=set(self.tasks) != {"caption"},
            writes=bool({"caption", "answer"} & set(self.tasks)),
            shares="caption" in self.tasks,
            pretrained=pretrained,
        )
        return MED(self, self.vision.build(pretrained=pretrained), texts)

    def tiny(self) -> "MEDConfig":
        """The tasks stay; a queue of 64 entries, if there is one."""
        momentum = self.momentum
        if momentum is not None:
            momentum = replace(momentum, queue=min(momentum.queue, 64), ramp=min(momentum.ramp, 4))
        return replace(
            self,
            vision=self.vision.tiny(),
            text=self.text.tiny(),
            embed=min(self.embed, 32),
            momentum=momentum,
            origin=None,
        )


# B batch  N images  P patches  F their width  T tokens  D width of the joint space  H width of the text side


COLDEST, FIRST, WARMEST = (
    0.001,
    0.07,
    0.5,
)  # the temperature: its bounds, and where it begins (blip_pretrain.py)


@dataclass
class Outputs:
    """What a forward gives; None is what `wants` did not name."""

    logits_BTV: Tensor | None = None
    labels_BT: Tensor | None = None
    image_BD: Tensor | None = None  # of length 1, as all vectors here
    text_BD: Tensor | None = None
    logit_scale: Tensor | None = (
        None  # (B,) float32: one over the temperature, for every image once
    )
    image_key_BD: Tensor | None = None  # of the twin, as all keys and queues
    text_key_BD: Tensor | None = None
    identity_B: Tensor | None = None
    image_queue_QD: Tensor | None = None
    text_queue_QD: Tensor | None = None
    identity_queue_Q: Tensor | None = None
    alpha: Tensor | None = None
    match_B3C: Tensor | None = None
    answers_ANV: Tensor | None = None  # at every place of an answer the logits of its token
    answers_AN: Tensor | None = None
    owner_A: Tensor | None = None
    weight_A: Tensor | None = None


class Heads(nn.Module):
    """`vision` and `text` into the joint space and its `temperature`, `match`, and the `transform` and `bias` of words.

    Each is there if a task needs it.
    """

    def __init__(self, spec: "MEDConfig", writer: Any | None) -> None:
        super().__init__()
        if "contrast" in spec.tasks:
            self.vision = nn.Linear(spec.vision.feature_width, spec.embed)
            self.text = nn.Linear(spec.text.width, spec.embed)
        if spec.momentum is not None:
            self.temperature = nn.Parameter(
                torch.tensor([FIRST])
            )  # (1,): DeepSpeed 0.19 takes no ()
        if "match" in spec.tasks:
            self.match = nn.Linear(spec.text.width, 2)
        if writer is not None:
            self.transform: nn.Module = writer.cls.predictions.transform
            self.bias: nn.Parameter = writer.cls.predictions.bias

    def scale(self, images: int) -> Tensor:
        """(N,) float32: one over the temperature, once for every image."""
        if not hasattr(self, "temperature"):
            return torch.full((images,), 1 / FIRST, device=self.vision.weight.device)
        raw = self.temperature.float()
        # its value is held, its gradient is not: beyond a bound it must find its way back
        held = raw.detach().clamp(COLDEST, WARMEST) + (raw - raw.detach())
        return (1 / held).expand(images)


@dataclass
class EncoderDecoderView:
    """Encoder and decoder as one encoder-decoder of transformers, which reads its prompt together with images."""

    encoder: Any
    writer: Any
    images_BPF: Tensor
    start: int  # the id that begins what is written

    @property
    def generation_config(self) -> Any:
        return SimpleNamespace(decoder_start_token_id=self.start)

    def __call__(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        decoder_input_ids: Tensor,
        use_cache: bool,
    ) -> Any:
        asked_BTH = self.encoder(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            encoder_hidden_states=self.images_BPF,
        ).last_hidden_state
        return self.writer(
            input_ids=decoder_input_ids,
            encoder_hidden_states=asked_BTH,
            encoder_attention_mask=attention_mask,
            use_cache=use_cache,
        )


class SkipPromptStreamer(BaseStreamer):
    """Keeps the prompt, which transformers puts first, from a streamer of what is new."""

    def __init__(self, streamer: Any) -> None:
        self._streamer = streamer
        self._begun = False

    def put(self, value: Tensor) -> None:
        if self._begun:
            self._streamer.put(value)
        self._begun = True

    def end(self) -> None:
        self._streamer.end()


def replace_first_token(ids_BT: Tensor, attention_BT: Tensor, token: int) -> Tensor:
    """The ids with `token` in the place of each row's first."""
    return ids_BT.scatter(1, attention_BT.int().argmax(-1, keepdim=True), token)


def positions(attention_BT: Tensor) -> Tensor:
    """(B, T): of real tokens alone, so that padding on the left moves none."""
    return (attention_BT.long().cumsum(-1) - 1).clamp(min=0)


def first_token_state(hidden_BTH: Tensor, attention_BT: Tensor) -> Tensor:
    """(B, H): what stands at each row's first real token."""
    rows_B = torch.arange(len(hidden_BTH), device=hidden_BTH.device)
    return hidden_BTH[rows_B, attention_BT.int().argmax(-1)]


# B batch  T tokens  N images  P patches, CLS first  F their width  S pixels of a side  D width of the joint space
# H width of the text side  V vocabulary  C candidates  R tokens of one


LOGITS, POOLED = frozenset({"logits"}), frozenset({"pooled"})
GIVES = {  # what a forward can give where the model has the task
    "contrast": {"pooled", "momentum"},
    "match": {"match", "match_lane", "match_all"},
    "caption": {"logits"},
    "answer": {"logits", "answers"},
}


class MED(VLMModule):
    """`vision`, `text` (the encoder), `decoder` (what it does not share), `heads` and `momentum`."""

    remedy: ClassVar = "change model.tasks, or give it a twin with model.momentum"

    def __init__(self, spec: "MEDConfig", vision: BlipViT, texts: TextModules) -> None:
        super().__init__()
        self.config = spec
        self.vision = vision
        if texts.encoder is not None:
            self.text = texts.encoder
        if texts.decoder is not None:
            self.decoder = texts.decoder
        self.heads = Heads(spec, texts.writer)
        self._writer = (
            texts.writer,
        )  # not a submodule: of what it shares, each parameter has one name
        given = frozenset[str]().union(*(GIVES[task] for task in spec.tasks))
        self.provides = given if spec.momentum is not None else given - {"momentum"}
        self.momentum = (
            None
            if spec.momentum is None
            else MomentumEncoder(spec.momentum, self._followed(), spec.embed)
        )
        cast(Any, self).register_load_state_dict_post_hook(_catch_up)  # torch leaves it untyped

    def forward(
        self,
        ids: Tensor,
        attention: Tensor,
        labels: Tensor | None = None,
        pixels: Tensor | None = None,
        features: Tensor | None = None,
        identity: Tensor | None = None,
        lane: Tensor | None = None,
        floor: float = FLOOR,
        answers: Tensor | None = None,
        answer_owner: Tensor | None = None,
        answer_weight: Tensor | None = None,
        requested: frozenset[str] = LOGITS,
    ) -> Outputs:
        """What `wants` names, as far as the tasks go, see GIVES.

        ids (B, T) int64 and attention (B, T) bool of [CLS] text [SEP], padded on either side; labels (B, T) int64,
        IGNORE where there is no loss; pixels (B, 3, S, S) uint8 or features (B, P, F); identity (B,) int64, equal for
        rows that show one image; lane (B,) int64 and floor, for the negatives to match; answers (A, N) int64, IGNORE on
        padding, with the row (A,) and the weight (A,) of each. Raises SpecError for what the tasks do not give,
        DataError for another number of images than rows.
        """
        self.check(requested)
        images_BPF = self._see(pixels, features)
        if len(images_BPF) != len(ids):
            raise DataError(
                f"{len(ids)} texts and {len(images_BPF)} images: every sample needs exactly one image"
            )
        identity = torch.full_like(ids[:, 0], -1) if identity is None else identity
        outputs = Outputs(labels_BT=labels, identity_B=identity)
        if requested & (GIVES["contrast"] | GIVES["match"]):
            outputs.image_BD, outputs.text_BD = (
                self.embed_images(images_BPF),
                self.embed_texts(ids, attention),
            )
            outputs.logit_scale = self.heads.scale(len(ids))
        if "momentum" in requested:
            self._recall(outputs, ids, attention, pixels=pixels, features=features)
        if judging := requested & GIVES["match"]:
            negatives = {"everywhere": "match_all" in judging, "floor": floor,
                         "lane_b": lane if "match_lane" in judging else None}  # fmt: skip
            outputs.match_B3C = self._judge(outputs, ids, attention, images_BPF, negatives)
        if "logits" in requested:
            outputs.logits_BTV = self._write(ids, attention, labels, images_BPF)
        if "answers" in requested:
            outputs.answers_AN, outputs.owner_A, outputs.weight_A = (
                answers,
                answer_owner,
                answer_weight,
            )
            outputs.answers_ANV = self._answer(
                ids, attention, labels, images_BPF, answers, answer_owner
            )
        return outputs

    # --- three modes -------------------------------------------------------------------------------------------------

    def read(self, ids: Tensor, attention: Tensor, images: Tensor | None = None) -> Tensor:
        """(B, T, H): the text alone, or ([ENC] first) with its image."""
        if images is not None:
            ids = replace_first_token(ids, attention, self.config.text.enc)
        hidden_BTH: Tensor = self.text(
            input_ids=ids,
            attention_mask=attention.long(),
            position_ids=positions(attention),
            encoder_hidden_states=images,
        ).last_hidden_state
        return hidden_BTH

    def _write(
        self, ids: Tensor, attention: Tensor, labels: Tensor | None, images_BPF: Tensor
    ) -> Tensor:
        """(B, T, V): at every place the logits of the token behind it."""
        if "answer" in self.config.tasks:
            if labels is None:
                raise DataError(
                    "a model that answers needs labels: they say where the question ends"
                )
            asked = replace_first_token(ids, attention, self.config.text.enc)
            embeds_BTH = self.text.embeddings.word_embeddings(asked)
            return encoder_decoder.logits(
                EncoderDecoderView(self.text, self.writer, images_BPF, self.config.text.dec),
                embeds_BTH,
                ids,
                attention,
                labels,
            )
        logits_BTV: Tensor = self.writer(
            input_ids=replace_first_token(ids, attention, self.config.text.dec),
            attention_mask=attention.long(),
            position_ids=positions(attention),
            encoder_hidden_states=images_BPF,
            use_cache=False,
        ).logits
        return logits_BTV

    def _answer(
        self,
        ids: Tensor,
        attention: Tensor,
        labels: Tensor | None,
        images_BPF: Tensor,
        answers_AN: Tensor | None,
        owner_A: Tensor | None,
    ) -> Tensor:
        """(A, N, V): every answer to its question, which is read once whatever the number of its answers."""
        if labels is None or answers_AN is None or owner_A is None:
            raise DataError(
                "a model that learns all answers of a question needs labels, answers and their questions"
            )
        has_BT, length = labels != IGNORE, ids.shape[1]
        first_B = torch.where(has_BT.any(-1), has_BT.int().argmax(-1), length).clamp(min=1)
        read = int(first_B.max())
        asked_BT = attention[:, :read].bool() & (
            torch.arange(read, device=ids.device) < first_B[:, None]
        )
        states_BTH = self.read(ids[:, :read], asked_BT, images_BPF)
        real_AN, start_A1 = (
            answers_AN != IGNORE,
            torch.full_like(answers_AN[:, :1], self.config.text.dec),
        )
        logits_ANV: Tensor = self.writer(
            input_ids=torch.cat([start_A1, answers_AN[:, :-1].clamp(min=0)], dim=1),
            attention_mask=real_AN.long(),
            encoder_hidden_states=states_BTH[owner_A],
            encoder_attention_mask=asked_BT[owner_A].long(),
            use_cache=False,
        ).logits
        return logits_ANV

    @property
    def writer(self) -> Any:
        """The decoder with its head, as transformers' BlipTextLMHeadModel."""
        return self._writer[0]

    # --- training ----------------------------------------------------------------------------------------------------

    def after_step(self) -> None:
        """The twin follows, the queues take what the step saw."""
        if self.momentum is not None:
            self.momentum.after_step(self._followed())

    def adopt(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of a MED with other tasks or another image size, as those of this one.

        What a decoder shared, and here owns, comes from the encoder; positions are interpolated; what no task needs is
        left out, and heads that are new stay as drawn. Raises WeightsError for weights that lack anything else.
        """
        found: dict[str, Tensor] = {}
        for name in self.state_dict():
            shared = f"text.{name.removeprefix('decoder.')}"
            source = shared if name.startswith("decoder.") and name not in state else name
            if source in state:
                found[name] = state[source]
            elif state and not any(
                fnmatchcase(name, glob) for glob in (*self.config.pretrained, "heads.*")
            ):
                raise WeightsError(
                    f"the weights to start from lack {name}: they are of another wiring than MED"
                )
        return remap_state_dict(self, found)

    def _followed(self) -> dict[str, Tensor]:
        """What the twin is a twin of: all that makes the pooled vectors."""
        parts = ("vision.", "text.", "heads.vision.", "heads.text.")
        own = {name: p for name, p in self.named_parameters() if name.startswith(parts)}
        return {name: p for name, p in own.items() if ".crossattention." not in name}

    def _recall(
        self, outputs: Outputs, ids: Tensor, attention: Tensor, **seen: Tensor | None
    ) -> None:
        """What the twin makes of the samples, and what it made of those before."""
        twin = cast(MomentumEncoder, self.momentum)
        with torch.no_grad():
            weights = twin.parameters_of_twin(self.heads.vision.weight.dtype)
            made: Outputs = functional_call(
                self, weights, (ids, attention), {**seen, "requested": POOLED}
            )
        outputs.image_key_BD, outputs.text_key_BD = made.image_BD, made.text_BD
        outputs.image_queue_QD, outputs.text_queue_QD = twin.image_queue_QD, twin.text_queue_QD
        outputs.identity_queue_Q, outputs.alpha = twin.identity_queue_Q, twin.alpha()
        if self.training and torch.is_grad_enabled():  # not in the first of two passes
            keys = Keys(
                cast(Tensor, made.image_BD),
                cast(Tensor, made.text_BD),
                cast(Tensor, outputs.identity_B),
            )
            twin.see(keys, outputs.labels_BT)

    def _judge(
        self,
        outputs: Outputs,
        ids: Tensor,
        attention: Tensor,
        images_BPF: Tensor,
        negatives: Mapping[str, Any],
    ) -> Tensor:
        """(B, 3, 2): every sample with its own image and text, and with a hard negative of each."""
        pairs = matching_pairs(
            ids,
            attention,
            images_BPF,
            image_bQD=cast(Tensor, outputs.image_BD).unsqueeze(1),
            text_bD=cast(Tensor, outputs.text_BD),
            scale=cast(Tensor, outputs.logit_scale)[0].detach(),
            identity_b=outputs.identity_B,
            **negatives,
        )
        with rng.repeated(3):
            hidden_MTH = self.read(*pairs)
        logits_M2: Tensor = self.heads.match(first_token_state(hidden_MTH, pairs.attention_MT))
        return group_by_sample(logits_M2)

    # --- inference ---------------------------------------------------------------------------------------------------

    def embed_images(self, features: Tensor) -> Tensor:
        """(N, D) float32 of length 1, of what the vision tower saw: (N, P, F)."""
        self._able("contrast")
        weight = self.heads.vision.weight
        return normalize(self.heads.vision(features[:, 0].to(weight.dtype)).float(), dim=-1)

    def embed_texts(self, ids: Tensor, attention: Tensor, labels: Tensor | None = None) -> Tensor:
        """(N, D) float32 of length 1. `labels` are not read: all tokens of a text are its own."""
        self._able("contrast")
        first_BH = first_token_state(self.read(ids, attention), attention)
        return normalize(self.heads.text(first_BH).float(), dim=-1)

    @torch.no_grad()
    def match(self, ids: Tensor, attention: Tensor, features: Tensor) -> Tensor:
        """(N,) float32: the log-odds that image i and text i belong together."""
        self._able("match")
        hidden_NTH = self.read(ids, attention, self._see(None, features))
        logits_N2: Tensor = self.heads.match(first_token_state(hidden_NTH, attention)).float()
        return logits_N2[:, 1] - logits_N2[:, 0]

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        attention: Tensor,
        pixels: Tensor | None = None,
        features: Tensor | None = None,
        **generation: Any,
    ) -> Tensor:
        """(B, new) ids behind prompts padded on the left; `generation` goes to transformers' `generate`.

        The prompt is the beginning of what is written ([CLS], or [CLS] a picture of), or the question.
        """
        self._able("caption", "answer")
        text, images_BPF = self.config.text, self._see(pixels, features)
        marks = SuppressTokensLogitsProcessor([text.dec, text.enc], device=str(ids.device))
        generation["logits_processor"] = LogitsProcessorList(
            [marks, *generation.get("logits_processor", ())]
        )
        if generation.get("streamer") is not None:
            generation["streamer"] = SkipPromptStreamer(generation["streamer"])
        if "answer" in self.config.tasks:
            states = {
                "encoder_hidden_states": self.read(ids, attention, images_BPF),
                "encoder_attention_mask": attention.long(),
            }
            ids, attention = (
                torch.full_like(ids[:, :1], text.dec),
                torch.ones_like(attention[:, :1]),
            )
        else:
            states, ids = (
                {"encoder_hidden_states": images_BPF},
                replace_first_token(ids, attention, text.dec),
            )
        rows_BT = self.writer.generate(
            input_ids=ids, attention_mask=attention.long(), **states, **generation
        )
        return cast(Tensor, rows_BT[:, ids.shape[1] :])

    @torch.no_grad()
    def continuations(self, prompt: Tensor, rest: Tensor, features: Tensor) -> Tensor:
        """(C, R, V): the logits of every token of `rest` (C, R) behind one `prompt` (1, T), padded on the right."""
        self._able("caption", "answer")
        images_1PF = self._see(None, features)
        states_1XH = images_1PF
        if "answer" in self.config.tasks:
            states_1XH = self.read(prompt, torch.ones_like(prompt, dtype=torch.bool), images_1PF)
            prompt = prompt[:, :1]
        begun_1T = torch.cat(
            [torch.full_like(prompt[:, :1], self.config.text.dec), prompt[:, 1:]], dim=1
        )
        rows_CT = torch.cat([begun_1T.expand(len(rest), -1), rest[:, :-1]], dim=1)
        states_CXH = states_1XH.expand(len(rest), -1, -1)
        logits_CTV: Tensor = self.writer(
            input_ids=rows_CT, encoder_hidden_states=states_CXH, use_cache=False
        ).logits
        return logits_CTV[:, prompt.shape[1] - 1 :]

    # --- inside ------------------------------------------------------------------------------------------------------

    def _able(self, *tasks: str) -> None:
        if not set(tasks) & set(self.config.tasks):
            raise SpecError(
                f"this MED has the tasks {', '.join(self.config.tasks)}, and this takes {' or '.join(tasks)}"
            )

    def _see(self, pixels: Tensor | None, features: Tensor | None) -> Tensor:
        """(N, P, F) in the model's dtype."""
        if (pixels is None) == (features is None):
            raise DataError("a MED reads either pixels or cached features of every image")
        seen_NPF: Tensor = self.vision(pixels) if features is None else features
        shape = (self.config.vision.tokens, self.config.vision.feature_width)
        if seen_NPF.shape[1:] != shape:
            raise DataError(
                f"the cached features are {tuple(seen_NPF.shape[1:])} an image and this tower's are {shape}: "
                "they come from another tower; compute them again"
            )
        return seen_NPF.to(next(self.heads.parameters()).dtype)


def _catch_up(model: nn.Module, incompatible: Any) -> None:
    """After weights without a twin, the twin is a copy of them."""
    med = cast(MED, model)
    absent = [name for name in incompatible.missing_keys if name.startswith("momentum.twin.")]
    if med.momentum is not None and absent:
        med.momentum.follow(med._followed(), 0.0)
