"""InstructBLIP's data: 26 datasets, of which 13 are learned from and 13 only tested on.

Dai et al. 2023, arXiv:2305.06500, 2.1 and figure 2.
"""

from bridgework.evaluation import VQA, Captions, MultipleChoice, Writing, YesNo
from bridgework.recipes._instruction_prompts import (
    ANSWER,
    ASK,
    CAPTION,
    CHOOSE,
    KNOW,
    READ,
    SIGNS,
    TALK,
)
from bridgework.system import EvalSpec, Source

HELD_IN = (  # rows as the paper counts them
    Source(name="coco", dataset="coco-karpathy", rows=82_000, prompts=CAPTION),
    Source(name="capfilt", dataset="blip2-capfilt-14m", rows=14_000_000, prompts=CAPTION),
    Source(name="textcaps", dataset="textcaps", rows=21_000, prompts=READ),
    Source(name="vqav2", dataset="vqav2", rows=82_000, prompts=ANSWER),
    Source(
        name="okvqa", dataset="okvqa", rows=9_000, prompts=KNOW, factor=2.0
    ),  # raised, and the next one lowered:
    Source(
        name="aokvqa", dataset="aokvqa", rows=17_000, prompts=CHOOSE, factor=0.5
    ),  # 2.4; by how much is not said
    Source(name="ocrvqa", dataset="ocrvqa", rows=800_000, prompts=SIGNS),
    Source(name="vqav2_ask", dataset="vqav2-ask", rows=82_000, prompts=ASK),
    Source(name="okvqa_ask", dataset="okvqa-ask", rows=9_000, prompts=ASK),
    Source(name="aokvqa_ask", dataset="aokvqa-ask", rows=17_000, prompts=ASK),
    Source(name="llava_detail", dataset="llava-detail", rows=23_000, prompts=TALK),
    Source(name="llava_reason", dataset="llava-reason", rows=77_000, prompts=TALK),
    Source(name="llava_talk", dataset="llava-talk", rows=58_000, prompts=TALK),
)
SHORT, SIGN = "Question: {} Short answer:", "OCR tokens: {ocr}. Question: {} Short answer:"
CAPTION_EVALS = {"nocaps": 4_500, "flickr30k": 1_000}
ANSWERED = {  # and what each is asked with (the first is the paper's; figure 2, appendix E)
    "gqa": SHORT, "vsr": SHORT, "textvqa": SIGN, "vizwiz": SHORT, "msvd_qa": SHORT, "msrvtt_qa": SHORT, "ivqa": SHORT,
}  # fmt: skip
CHOSEN = {  # candidates of each question, ranked by their log-likelihood (2.5)
    "iconqa": "Question: {} Options: {options}. Short answer:",
    "scienceqa": "{} Options: {options}. Answer:",  # its rows give the context before the question
    "visdial": "{} Short answer:",  # its rows give the dialog's history; by MRR
}
CAPTIONING = Writing(beams=5, least=10, most=80)  # as the release's configurations, here and below
BRIEFLY = Writing(beams=5, most=10, length_penalty=-1.0)
HELD_OUT: tuple[EvalSpec, ...] = (
    *(Captions(name=name, dataset=name, rows=rows, prompts=("A short image description:",), writing=CAPTIONING)
      for name, rows in CAPTION_EVALS.items()),
    *(VQA(name=name, dataset=name.replace("_", "-"), prompts=(prompt,), writing=BRIEFLY)
      for name, prompt in ANSWERED.items()),
    *(MultipleChoice(name=name, dataset=name, prompts=(prompt,)) for name, prompt in CHOSEN.items()),
    YesNo(name="hateful_memes", dataset="hateful-memes",  # by AUC
          prompts=("{} Answer:",)),  # its rows ask: This is an image with: ".." written on it. Is it hateful?
)  # fmt: skip
