"""MED, BLIP's mixture of encoder and decoder: a vision tower and BERT in three modes.

Li et al. 2022, arXiv:2201.12086, 3.1. The text is encoded alone, encoded with an image ([ENC]
first), or decoded from an image ([DEC] first). For VQA the encoder reads the unlabeled tokens, the
question, with the image, and the decoder attends to the encoder alone (4.3). Rows of ids have no
image places, because every sample has one image.
"""

# B batch  T tokens  N images  P patches, CLS first  F their width  S pixels of a side
# D width of the joint space  H width of the text side  V vocabulary  C candidates  R tokens of one

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from types import SimpleNamespace
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import normalize

from bridgework import rng
from bridgework.config import added, config_class
from bridgework.errors import DataError, SpecError, WeightsError
from bridgework.losses.matching import FLOOR, group_by_sample, matching_pairs
from bridgework.models import encoder_decoder
from bridgework.models.attention_masks import padded_positions
from bridgework.models.base import Outputs, PairModel, PairModelConfig
from bridgework.models.blip_text import MEDTextConfig, TextModules
from bridgework.models.blip_vit import BlipViTConfig
from bridgework.models.momentum_encoder import MomentumConfig, MomentumEncoder, MomentumKeys
from bridgework.models.origin import Origin
from bridgework.models.vision import EfficientNetConfig, VisionTower, remap_state_dict
from bridgework.system import IGNORE

Task = Literal["contrast", "match", "caption", "answer"]
LOGITS, POOLED = frozenset({"logits"}), frozenset({"pooled"})
OUTPUTS = {  # outputs that each task provides
    "contrast": {"pooled", "momentum"},
    "match": {"match", "match_lane", "match_all"},
    "caption": {"logits"},
    "answer": {"logits", "answers"},
}
# the learned temperature: initial value and bounds (blip_pretrain.py)
FIRST_TEMPERATURE, MIN_TEMPERATURE, MAX_TEMPERATURE = 0.07, 0.001, 0.5


@config_class
class MEDConfig(PairModelConfig):
    """A vision tower and the text modules that the tasks need.

    The tower's first vector is the image's in the joint space: CLS, or the one of an EfficientNet.

    With an encoder, a captioning decoder shares all its weights except self-attention (3.2). In
    caption-only and VQA models it owns its weights, as in the released fine-tunes.
    """

    vision: BlipViTConfig | EfficientNetConfig
    text: MEDTextConfig
    tasks: tuple[Task, ...] = ("contrast", "match", "caption")
    embed: int = 256
    momentum: MomentumConfig | None = None  # momentum encoder, for MomentumContrastive
    origin: Origin | None = added(default=None)  # of an imported model: fields for its export

    def __post_init__(self) -> None:
        if not self.tasks or {"caption", "answer"} <= set(self.tasks):
            raise SpecError(
                f"model.tasks are one or more, and either caption or answer, got {self.tasks}"
            )
        if "contrast" not in self.tasks and ("match" in self.tasks or self.momentum is not None):
            raise SpecError(
                "model.tasks: hard negatives and a momentum encoder need the vectors of "
                "'contrast'. Fix: add it to tasks"
            )
        width = self.vision.feature_width
        if "answer" in self.tasks and width != self.text.width:
            raise SpecError(
                "an answer is decoded from the encoder's states: "
                f"vision.width {width} must be text.width {self.text.width}"
            )
        if isinstance(self.vision, EfficientNetConfig) and self.vision.grid != 1:
            raise SpecError(
                "model.vision.grid: one vector is the image's in the joint space. "
                f"Got {self.vision.grid}; expected 1. Fix: set vision.grid=1, or take a BlipViT"
            )

    def unshardable(self, requested: frozenset[str]) -> str:
        return (
            "a MED's encoder, decoder and momentum encoder share weights, "
            "which every worker needs complete"
        )

    @property
    def tokenizer(self) -> str:
        return self.text.tokenizer

    @property
    def context(self) -> int:
        return self.text.context

    @property
    def pretrained(self) -> tuple[str, ...]:
        """Globs of reproducible parameters, with the momentum encoder, which starts as a copy."""
        vision = () if self.vision.weights is None else ("vision.*",)
        return vision if self.momentum is None else (*vision, "momentum.*")

    def build(self, *, pretrained: bool = True) -> "MED":
        """Return the model in float32.

        Without weights, or with `pretrained=False`, it is drawn from torch's generator.
        """
        texts = self.text.build(
            self.vision.feature_width,
            reads=set(self.tasks) != {"caption"},
            writes=bool({"caption", "answer"} & set(self.tasks)),
            shares="caption" in self.tasks,
            pretrained=pretrained,
        )
        return MED(self, self.vision.build(pretrained=pretrained), texts)

    def tiny(self) -> "MEDConfig":
        """Return a tiny config with the same tasks; a queue has 64 entries."""
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


class MED(PairModel):
    """`vision`, `text` (the encoder), `decoder` (without shared modules), `heads`, `momentum`."""

    remedy: ClassVar = "change model.tasks, or add a momentum encoder with model.momentum"

    def __init__(self, config: MEDConfig, vision: VisionTower, texts: TextModules) -> None:
        super().__init__()
        self.config = config
        self.vision = vision
        if texts.encoder is not None:
            self.text = texts.encoder
        if texts.decoder is not None:
            self.decoder = texts.decoder
        self.heads = MEDHeads(config, texts.writer)
        # a tuple, not a submodule, so that each shared parameter has one name
        self._writer = (texts.writer,)
        provided = frozenset[str]().union(*(OUTPUTS[task] for task in config.tasks))
        self.provides = provided if config.momentum is not None else provided - {"momentum"}
        self.momentum = (
            None
            if config.momentum is None
            else MomentumEncoder(config.momentum, self._momentum_source(), config.embed)
        )
        hook = cast(Any, self).register_load_state_dict_post_hook  # torch leaves it untyped
        hook(_copy_to_momentum_encoder)

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
        """Return the requested outputs, of those in OUTPUTS for the model's tasks.

        ids: (B, T) int64 and attention: (B, T) bool, of [CLS] text [SEP], padded on either side.
        labels: (B, T) int64, IGNORE where there is no loss.
        pixels: (B, 3, S, S) uint8, or features: (B, P, F).
        identity: (B,) int64, equal for rows that show one image.
        lane, floor: (B,) int64 and a probability, for hard negatives.
        answers: (A, N) int64, IGNORE on padding, with row (A,) and weight (A,) of each answer.

        Raises SpecError for outputs that the tasks do not provide, DataError unless every row has
        one image.
        """
        self.check(requested)
        images_BPF = self._images(pixels, features, samples=len(ids))
        identity = torch.full_like(ids[:, 0], -1) if identity is None else identity
        outputs = Outputs(labels_BT=labels, identity_B=identity)
        if requested & (OUTPUTS["contrast"] | OUTPUTS["match"]):
            outputs.image_BD = self.embed_images(images_BPF)
            outputs.text_BD = self.embed_texts(ids, attention)
            outputs.logit_scale = self.heads.scale(len(ids))
        if "momentum" in requested:
            self._run_momentum_encoder(outputs, ids, attention, pixels=pixels, features=features)
        if kinds := requested & OUTPUTS["match"]:
            negatives = {
                "everywhere": "match_all" in kinds,
                "floor": floor,
                "lane_b": lane if "match_lane" in kinds else None,
            }
            outputs.match_B3C = self._match(outputs, ids, attention, images_BPF, negatives)
        if "logits" in requested:
            outputs.logits_BTV = self._decode(ids, attention, labels, images_BPF)
        if "answers" in requested:
            outputs.answers_AN, outputs.owner_A = answers, answer_owner
            outputs.weight_A = answer_weight
            outputs.answers_ANV = self._decode_answers(
                ids, attention, labels, images_BPF, answers, answer_owner
            )
        return outputs

    # --- the three modes ---

    def encode(self, ids: Tensor, attention: Tensor, images: Tensor | None = None) -> Tensor:
        """Return (B, T, H): states of the text alone, or ([ENC] first) of text and image."""
        if images is not None:
            ids = replace_first_token(ids, attention, self.config.text.enc)
        hidden_BTH: Tensor = self.text(
            input_ids=ids,
            attention_mask=attention.long(),
            position_ids=padded_positions(attention),
            encoder_hidden_states=images,
        ).last_hidden_state
        return hidden_BTH

    def _decode(
        self, ids: Tensor, attention: Tensor, labels: Tensor | None, images_BPF: Tensor
    ) -> Tensor:
        """Return (B, T, V), the next-token logits of every token."""
        if "answer" in self.config.tasks:
            if labels is None:
                raise DataError(
                    "a model that answers needs labels, because they mark the end of the question"
                )
            question_ids = replace_first_token(ids, attention, self.config.text.enc)
            embeds_BTH = self.text.embeddings.word_embeddings(question_ids)
            view = EncoderDecoderView(self.text, self.writer, images_BPF, self.config.text.dec)
            return encoder_decoder.logits(view, embeds_BTH, ids, attention, labels)
        logits_BTV: Tensor = self.writer(
            input_ids=replace_first_token(ids, attention, self.config.text.dec),
            attention_mask=attention.long(),
            position_ids=padded_positions(attention),
            encoder_hidden_states=images_BPF,
            use_cache=False,
        ).logits
        return logits_BTV

    def _decode_answers(
        self,
        ids: Tensor,
        attention: Tensor,
        labels: Tensor | None,
        images_BPF: Tensor,
        answers_AN: Tensor | None,
        owner_A: Tensor | None,
    ) -> Tensor:
        """Return (A, N, V): logits of every answer to its question, which is encoded once."""
        if labels is None or answers_AN is None or owner_A is None:
            raise DataError(
                "a model that learns all answers of a question needs labels, answers and owners"
            )
        has_BT, length = labels != IGNORE, ids.shape[1]
        first_B = torch.where(has_BT.any(-1), has_BT.int().argmax(-1), length).clamp(min=1)
        longest = int(first_B.max())
        place_T = torch.arange(longest, device=ids.device)
        question_BT = attention[:, :longest].bool() & (place_T < first_B[:, None])
        states_BTH = self.encode(ids[:, :longest], question_BT, images_BPF)
        real_AN = answers_AN != IGNORE
        start_A1 = torch.full_like(answers_AN[:, :1], self.config.text.dec)
        logits_ANV: Tensor = self.writer(
            input_ids=torch.cat([start_A1, answers_AN[:, :-1].clamp(min=0)], dim=1),
            attention_mask=real_AN.long(),
            encoder_hidden_states=states_BTH[owner_A],
            encoder_attention_mask=question_BT[owner_A].long(),
            use_cache=False,
        ).logits
        return logits_ANV

    @property
    def writer(self) -> Any:
        """The decoder with its head, as transformers' BlipTextLMHeadModel."""
        return self._writer[0]

    # --- training ---

    def after_step(self) -> None:
        """Update the momentum encoder and its queues."""
        if self.momentum is not None:
            self.momentum.after_step(self._momentum_source())

    def adopt(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights of a MED with other tasks or another image size, as those of this one.

        Decoder modules that were shared, and are owned here, come from the encoder. Positions are
        interpolated, modules that no task needs are dropped, and new heads stay random. Raises
        WeightsError for weights that lack anything else.
        """
        adopted: dict[str, Tensor] = {}
        for name in self.state_dict():
            shared = f"text.{name.removeprefix('decoder.')}"
            source = shared if name.startswith("decoder.") and name not in state else name
            optional = (*self.config.pretrained, "heads.*")
            if source in state:
                adopted[name] = state[source]
            elif state and not any(fnmatchcase(name, glob) for glob in optional):
                raise WeightsError(
                    f"the weights to start from lack {name}: they are of another wiring than MED"
                )
        return remap_state_dict(self, adopted)

    def _momentum_source(self) -> dict[str, Tensor]:
        """Return the parameters of the pooled vectors, which the momentum encoder averages."""
        parts = ("vision.", "text.", "heads.vision.", "heads.text.")
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if name.startswith(parts) and ".crossattention." not in name
        }

    def _run_momentum_encoder(
        self, outputs: Outputs, ids: Tensor, attention: Tensor, **images: Tensor | None
    ) -> None:
        """Add the momentum encoder's keys of the samples, and the queues, to `outputs`."""
        encoder = cast(MomentumEncoder, self.momentum)
        with torch.no_grad():
            weights = encoder.averaged_parameters(self.heads.vision.weight.dtype)
            keys: Outputs = functional_call(
                self, weights, (ids, attention), {**images, "requested": POOLED}
            )
        outputs.image_key_BD, outputs.text_key_BD = keys.image_BD, keys.text_BD
        outputs.image_queue_QD = encoder.image_queue_QD
        outputs.text_queue_QD = encoder.text_queue_QD
        outputs.identity_queue_Q, outputs.alpha = encoder.identity_queue_Q, encoder.alpha()
        if self.training and torch.is_grad_enabled():  # not in the first of two passes
            encoder.remember(
                MomentumKeys(
                    cast(Tensor, keys.image_BD),
                    cast(Tensor, keys.text_BD),
                    cast(Tensor, outputs.identity_B),
                ),
                outputs.labels_BT,
            )

    def _match(
        self,
        outputs: Outputs,
        ids: Tensor,
        attention: Tensor,
        images_BPF: Tensor,
        negatives: Mapping[str, Any],
    ) -> Tensor:
        """Return (B, 3, 2): logits of each sample's pair, and of a hard negative image and text."""
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
            hidden_MTH = self.encode(*pairs)
        logits_M2: Tensor = self.heads.match(first_token_state(hidden_MTH, pairs.attention_MT))
        return group_by_sample(logits_M2)

    # --- inference ---

    def embed_images(self, features: Tensor) -> Tensor:
        """Return (N, D) float32 of unit length, from the vision tower's output (N, P, F)."""
        self._check_task("contrast")
        weight = self.heads.vision.weight
        return normalize(self.heads.vision(features[:, 0].to(weight.dtype)).float(), dim=-1)

    def embed_texts(self, ids: Tensor, attention: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return (N, D) float32 of unit length; `labels` are ignored, all tokens count."""
        self._check_task("contrast")
        first_BH = first_token_state(self.encode(ids, attention), attention)
        return normalize(self.heads.text(first_BH).float(), dim=-1)

    @torch.no_grad()
    def match(self, ids: Tensor, attention: Tensor, features: Tensor) -> Tensor:
        """Return (N,) float32, the log-odds that image i and text i belong together."""
        self._check_task("match")
        hidden_NTH = self.encode(ids, attention, self._images(None, features))
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
        """Return (B, new) ids after prompts padded on the left.

        The prompt is the start of the caption, e.g. [CLS] or [CLS] a picture of, or the question.
        `generation` is passed to transformers' `generate`.
        """
        # takes seconds: not before a model generates
        from transformers import LogitsProcessorList, SuppressTokensLogitsProcessor

        self._check_task("caption", "answer")
        text, images_BPF = self.config.text, self._images(pixels, features)
        suppress = SuppressTokensLogitsProcessor([text.dec, text.enc], device=str(ids.device))
        generation["logits_processor"] = LogitsProcessorList(
            [suppress, *generation.get("logits_processor", ())]
        )
        if generation.get("streamer") is not None:
            generation["streamer"] = encoder_decoder.SkipPromptStreamer(generation["streamer"])
        if "answer" in self.config.tasks:
            states = {
                "encoder_hidden_states": self.encode(ids, attention, images_BPF),
                "encoder_attention_mask": attention.long(),
            }
            ids = torch.full_like(ids[:, :1], text.dec)
            attention = torch.ones_like(attention[:, :1])
        else:
            states = {"encoder_hidden_states": images_BPF}
            ids = replace_first_token(ids, attention, text.dec)
        rows_BT = self.writer.generate(
            input_ids=ids, attention_mask=attention.long(), **states, **generation
        )
        return cast(Tensor, rows_BT[:, ids.shape[1] :])

    @torch.no_grad()
    def continuations(self, prompt: Tensor, rest: Tensor, features: Tensor) -> Tensor:
        """Return (C, R, V), the logits of every token of `rest` (C, R) after one `prompt` (1, T).

        `rest` is padded on the right with IGNORE.
        """
        self._check_task("caption", "answer")
        images_1PF = self._images(None, features)
        states_1XH = images_1PF
        if "answer" in self.config.tasks:
            attention = torch.ones_like(prompt, dtype=torch.bool)
            states_1XH = self.encode(prompt, attention, images_1PF)
            prompt = prompt[:, :1]
        start_11 = torch.full_like(prompt[:, :1], self.config.text.dec)
        prompt_1T = torch.cat([start_11, prompt[:, 1:]], dim=1)
        read_CL = rest[:, :-1].masked_fill(rest[:, :-1] == IGNORE, 0)
        rows_CT = torch.cat([prompt_1T.expand(len(rest), -1), read_CL], dim=1)
        states_CXH = states_1XH.expand(len(rest), -1, -1)
        logits_CTV: Tensor = self.writer(
            input_ids=rows_CT, encoder_hidden_states=states_CXH, use_cache=False
        ).logits
        return logits_CTV[:, prompt.shape[1] - 1 :]

    def _check_task(self, *tasks: str) -> None:
        """Raise SpecError unless the model has one of these tasks."""
        if not set(tasks) & set(self.config.tasks):
            raise SpecError(
                f"model.tasks: this method needs {' or '.join(tasks)}. "
                f"Got {', '.join(self.config.tasks)}"
            )

    def _images(
        self, pixels: Tensor | None, features: Tensor | None, *, samples: int | None = None
    ) -> Tensor:
        """Return (N, P, F) in the model's dtype."""
        patches_NPF = self.image_patches(pixels, features, samples=samples)
        return patches_NPF.to(next(self.heads.parameters()).dtype)


class MEDHeads(nn.Module):
    """Heads of the model's tasks.

    `vision` and `text` project into the joint space, with its `temperature`; `match` classifies
    pairs; `transform` and `bias` belong to the decoder's vocabulary head.
    """

    def __init__(self, config: MEDConfig, writer: Any | None) -> None:
        super().__init__()
        if "contrast" in config.tasks:
            self.vision = nn.Linear(config.vision.feature_width, config.embed)
            self.text = nn.Linear(config.text.width, config.embed)
        if config.momentum is not None:
            # (1,), because DeepSpeed 0.19 takes no scalar parameter
            self.temperature = nn.Parameter(torch.tensor([FIRST_TEMPERATURE]))
        if "match" in config.tasks:
            self.match = nn.Linear(config.text.width, 2)
        if writer is not None:
            self.transform: nn.Module = writer.cls.predictions.transform
            self.bias: nn.Parameter = writer.cls.predictions.bias

    def scale(self, images: int) -> Tensor:
        """Return (N,) float32, 1 / temperature repeated for every image."""
        if not hasattr(self, "temperature"):
            return torch.full((images,), 1 / FIRST_TEMPERATURE, device=self.vision.weight.device)
        raw = self.temperature.float()
        # clamp the value but not the gradient, so that it can return from beyond a bound
        clamped = raw.detach().clamp(MIN_TEMPERATURE, MAX_TEMPERATURE) + (raw - raw.detach())
        return (1 / clamped).expand(images)


@dataclass
class EncoderDecoderView:
    """Encoder and decoder as one transformers encoder-decoder that reads prompts with images."""

    encoder: Any
    writer: Any
    images_BPF: Tensor
    start: int  # id of the first decoder token

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
        """Return the decoder's outputs."""
        prompt_BTH = self.encoder(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            encoder_hidden_states=self.images_BPF,
        ).last_hidden_state
        return self.writer(
            input_ids=decoder_input_ids,
            encoder_hidden_states=prompt_BTH,
            encoder_attention_mask=attention_mask,
            use_cache=use_cache,
        )


def replace_first_token(ids_BT: Tensor, attention_BT: Tensor, token: int) -> Tensor:
    """Return the ids with `token` instead of the first real token of each row."""
    return ids_BT.scatter(1, attention_BT.int().argmax(-1, keepdim=True), token)


def first_token_state(hidden_BTH: Tensor, attention_BT: Tensor) -> Tensor:
    """Return (B, H), the state of the first real token of each row."""
    rows_B = torch.arange(len(hidden_BTH), device=hidden_BTH.device)
    return hidden_BTH[rows_B, attention_BT.int().argmax(-1)]


def _copy_to_momentum_encoder(model: nn.Module, incompatible: Any) -> None:
    """Copy the model to its momentum encoder, if loaded weights did not have one."""
    med = cast(MED, model)
    absent = [name for name in incompatible.missing_keys if name.startswith("momentum.twin.")]
    if med.momentum is not None and absent:
        med.momentum.update(med._momentum_source(), 0.0)
