"""Parts of MED's module: its outputs, its heads, and what stands between it and transformers."""

# B batch  N images  P patches  F their width  T tokens  D width of the joint space  H width of the text side

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer

if TYPE_CHECKING:
    from bridgework.models.med import MED

COLDEST, FIRST, WARMEST = 0.001, 0.07, 0.5  # the temperature: its bounds, and where it begins (blip_pretrain.py)


@dataclass
class Outputs:
    """What a forward gives; None is what `wants` did not name."""

    logits_BTV: Tensor | None = None
    labels_BT: Tensor | None = None
    image_BD: Tensor | None = None  # of length 1, as all vectors here
    text_BD: Tensor | None = None
    logit_scale: Tensor | None = None  # (B,) float32: one over the temperature, for every image once
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

    def __init__(self, spec: "MED", writer: Any | None) -> None:
        super().__init__()
        if "contrast" in spec.tasks:
            self.vision = nn.Linear(spec.vision.feature_width, spec.embed)
            self.text = nn.Linear(spec.text.width, spec.embed)
        if spec.momentum is not None:
            self.temperature = nn.Parameter(torch.tensor([FIRST]))  # (1,): DeepSpeed 0.19 takes no ()
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
class Halves:
    """Encoder and decoder as one encoder-decoder of transformers, which reads its prompt together with images."""

    encoder: Any
    writer: Any
    images_BPF: Tensor
    start: int  # the id that begins what is written

    @property
    def generation_config(self) -> Any:
        return SimpleNamespace(decoder_start_token_id=self.start)

    def __call__(
        self, inputs_embeds: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor, use_cache: bool
    ) -> Any:
        asked_BTH = self.encoder(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, encoder_hidden_states=self.images_BPF
        ).last_hidden_state
        return self.writer(
            input_ids=decoder_input_ids,
            encoder_hidden_states=asked_BTH,
            encoder_attention_mask=attention_mask,
            use_cache=use_cache,
        )


class Behind(BaseStreamer):
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


def begun(ids_BT: Tensor, attention_BT: Tensor, token: int) -> Tensor:
    """The ids with `token` in the place of each row's first."""
    return ids_BT.scatter(1, attention_BT.int().argmax(-1, keepdim=True), token)


def positions(attention_BT: Tensor) -> Tensor:
    """(B, T): of real tokens alone, so that padding on the left moves none."""
    return (attention_BT.long().cumsum(-1) - 1).clamp(min=0)


def at_first(hidden_BTH: Tensor, attention_BT: Tensor) -> Tensor:
    """(B, H): what stands at each row's first real token."""
    rows_B = torch.arange(len(hidden_BTH), device=hidden_BTH.device)
    return hidden_BTH[rows_B, attention_BT.int().argmax(-1)]
