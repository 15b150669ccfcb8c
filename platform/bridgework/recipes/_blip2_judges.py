"""What BLIP-2 is judged by: retrieval for its first stage, questions without any training on them for its second."""

from bridgework.evaluation import VQA, HeldOutLoss, Retrieval, Writing
from bridgework.system import EvalSpec

FOUND = (Retrieval(name="coco", dataset="coco-karpathy-test", rows=5_000, rerank=128),
         Retrieval(name="flickr30k", dataset="flickr30k-test", rows=1_000, rerank=128))  # fmt: skip


def answered(*, short: bool) -> tuple[EvalSpec, ...]:
    """`short`: as Flan-T5 is asked (4.1)."""
    asks = "Question: {} Short answer:" if short else "Question: {} Answer:"
    briefly = Writing(beams=5, most=10, length_penalty=-1.0)  # 4.1
    return (
        HeldOutLoss(name="nocaps", dataset="nocaps-val", rows=1_000),
        VQA(name="vqav2", dataset="vqav2-val", rows=5_000, prompts=(asks,), writing=briefly),
    )
