"""Old names of classes, fields, files and tags, so that files written before a rename still load.

`config.from_dict` reads a recipe's class names through CLASSES and its fields through FIELDS.
No other module of the package contains an old name.
"""

CLASSES = {  # "module:Class", old -> today's, without the prefix `bridgework.`
    "cli.models:Evaluations": "evaluation.kinds:Evaluations",
    "cli_models:Judges": "evaluation.kinds:Evaluations",
    "curation.flow:Limits": "curation.runner:CurationLimits",
    "data.mixtures:Bare": "data.mixture_report:ByteModelConfig",
    "evaluation.heldout:HeldOutLoss": "evaluation.likelihood:HeldOutLoss",
    "evaluation.ranking:Ranking": "evaluation.likelihood:Ranking",
    "evaluation.writing:Writing": "evaluation.base:Writing",
    "losses.captioning:Captioning": "losses.language_modeling:LanguageModeling",
    "losses.momentum:MomentumContrastive": "losses.contrastive:MomentumContrastive",
    "losses.preference:Preference": "losses.dpo:DPO",
    "losses.query_contrast:QueryContrast": "losses.contrastive:QueryContrast",
    "models.bridges.gated_xattn:Gates": "models.gated_cross_attention:GatesConfig",
    "models.bridges.projector:Linear": "models.projectors:LinearConfig",
    "models.bridges.projector:MLP": "models.projectors:MLPConfig",
    "models.bridges.projector:Concat": "models.projectors:ConcatConfig",
    "models.bridges.qformer:QFormer": "models.qformer:QFormerConfig",
    "models.bridges.resampler:Resampler": "models.resampler:ResamplerConfig",
    "models.crossattn_vlm:CrossAttentionVLM": "models.cross_attention_vlm:CrossAttentionVLMConfig",
    "models.dual_encoder:DualEncoder": "models.dual_encoder:DualEncoderConfig",
    "models.eva:EvaConfig": "models.blip_vit:EvaConfig",
    "models.image_classifier:ImageClassifier": "models.image_classifier:ImageClassifierConfig",
    "models.lora:LoRA": "models.lora:LoRAConfig",
    "models.med:MED": "models.blip_med:MEDConfig",
    "models.med_text:MEDTextConfig": "models.blip_text:MEDTextConfig",
    "models.modified_resnet:ModifiedResNetConfig": "models.clip_resnet:ModifiedResNetConfig",
    "models.momentum:MomentumConfig": "models.momentum_encoder:MomentumConfig",
    "models.prefix_vlm:PrefixVLM": "models.prefix_vlm:PrefixVLMConfig",
    "models.qformer_pretrainer:QFormerPretrainer": "models.qformer_pretrainer:QFormerPretrainerConfig",
    "models.text:CLIPTextConfig": "models.clip_text:CLIPTextConfig",
    "serving.images:Limits": "serving.options:RequestLimits",
}

FIELDS = {"inherits": "init_params", "shard": "zero"}  # fields of a Stage: old name -> today's
ARTIFACT_DIR, ARTIFACT_FILE = "artefact", "artefact.json"  # in a stage's folder
ARTIFACT_TAG = "artefact"  # of versions and logged models in MLflow
FLIGHT_RECORDER_DIR = "flight"  # in a stage's folder


def current_class(name: str) -> str:
    """Return today's name of a config class, e.g. of `bridgework.models.med:MED`."""
    package, _, short = name.partition(".")
    return f"bridgework.{CLASSES[short]}" if package == "bridgework" and short in CLASSES else name
