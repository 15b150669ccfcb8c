"""Old names of config classes and of keys, so that files written before a rename still load.

`config.from_dict` reads a recipe's class names through CLASSES and its fields through FIELDS.
Nothing else in the package keeps an old name.
"""

CLASSES = {  # "module:Class" as written before -> today's, without `bridgework.`
    "cli_models:Judges": "cli.models:Evaluations",
    "curation.flow:Limits": "curation.runner:Limits",
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
    "serving.images:Limits": "serving.options:Limits",
}

FIELDS = {"inherits": "init_params", "shard": "zero"}  # of a Stage, as recipes were written before
ARTIFACT_DIR, ARTIFACT_FILE = "artifact", "artifact.json"  # of a stage's folder
ARTIFACT_TAG = "artifact"  # of versions and logged models in MLflow


def current_class(name: str) -> str:
    """Return the name today of a config class: `bridgework.models.med:MED` is in models.blip_med."""
    package, _, short = name.partition(".")
    return f"bridgework.{CLASSES[short]}" if package == "bridgework" and short in CLASSES else name
