"""Networks for detection, segmentation, pose, depth, video, flow, speech and text, with random weights.

``NETWORKS`` maps a name to its :class:`Task`. Nothing is downloaded. torchvision's are whole; ultralytics' come from
its configurations; transformers' are smaller versions of real architectures.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm_import import let_detectors_run, let_torchvision_import
from torch import Tensor, nn

let_torchvision_import()


@dataclass(frozen=True)
class Task:
    """A network and what it is called with.

    :param task: what it is for.
    :param library: where it comes from.
    :param build: gives the network and its example inputs, and what it trains with where that is more.
    """

    task: str
    library: str
    build: Callable[[], tuple[Any, ...]]


NETWORKS: dict[str, Task] = {}


def pixels(size: int, batch: int = 1) -> Tensor:
    return torch.rand(batch, 3, size, size)


# -- torchvision ----------------------------------------------------------------------------------------------------


FEW_BOXES = {
    f"rpn_{which}_nms_top_n_{mode}": n for which, n in (("pre", 64), ("post", 16)) for mode in ("train", "test")
}


def detector(name: str, task: str = "detection", size: int = 224, **options: Any) -> None:
    def build() -> tuple[Any, ...]:
        from torchvision.models import detection

        let_detectors_run()
        model = getattr(detection, name)(weights=None, weights_backbone=None, **options)
        masks, points = torch.zeros(1, size, size, dtype=torch.uint8), torch.full((1, 17, 3), 50.0)
        masks[0, 20:90, 10:80] = 1
        target = {
            "boxes": torch.tensor([[10.0, 20, 80, 90]]), "labels": torch.tensor([1]), "masks": masks,
            "keypoints": points,
        }  # fmt: skip
        images = [torch.rand(3, size, size)]
        return model, (images,), (images * 2, [target, target])

    NETWORKS[name] = Task(task, "torchvision", build)


def torchvision_networks() -> None:
    fixed = {"min_size": 224, "max_size": 224}
    detector("retinanet_resnet50_fpn", **fixed)
    detector("fcos_resnet50_fpn", **fixed)
    detector("fasterrcnn_mobilenet_v3_large_fpn", **fixed, **FEW_BOXES)
    detector("maskrcnn_resnet50_fpn", "instance segmentation", **fixed, **FEW_BOXES)
    detector("keypointrcnn_resnet50_fpn", "pose", **fixed, **FEW_BOXES)
    detector("ssdlite320_mobilenet_v3_large", size=320)
    detector("ssd300_vgg16", size=300)

    def model(name: str, task: str, part: str, *inputs: int, **options: Any) -> None:
        def build() -> tuple[Any, ...]:
            import torchvision

            made = getattr(getattr(torchvision.models, part), name)(weights=None, **options)
            x = torch.rand(inputs)
            return made, (x, torch.rand(inputs)) if task == "optical flow" else x

        NETWORKS[name] = Task(task, "torchvision", build)

    for name in ("deeplabv3_resnet50", "fcn_resnet50", "lraspp_mobilenet_v3_large"):
        model(name, "segmentation", "segmentation", 2, 3, 224, 224, weights_backbone=None)
    for name in ("r3d_18", "mc3_18", "r2plus1d_18"):
        model(name, "video", "video", 1, 3, 16, 112, 112)
    model("raft_small", "optical flow", "optical_flow", 1, 3, 128, 128)


# -- ultralytics ----------------------------------------------------------------------------------------------------


def ultralytics_networks() -> None:
    def network(config: str, task: str = "detection", kind: str = "DetectionModel") -> None:
        def build() -> tuple[Any, ...]:
            from ultralytics.nn import tasks

            return getattr(tasks, kind)(f"{config}.yaml", verbose=False), pixels(320, 2)

        NETWORKS[config] = Task(task, "ultralytics", build)

    for config in ("yolov5n", "yolov8n", "yolov9t", "yolov10n", "yolo11n", "yolo12n", "yolo26n"):
        network(config)
    network("yolov8n-seg", "instance segmentation", "SegmentationModel")
    network("yolov8n-pose", "pose", "PoseModel")
    network("yolo26n-pose", "pose", "PoseModel")
    network("rtdetr-l", "detection", "RTDETRDetectionModel")


# -- transformers ---------------------------------------------------------------------------------------------------

WORDS = {"vocab_size": 1000, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WIDTH = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6, "intermediate_size": 768}
NAMED = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}


def tokens(length: int = 64) -> Tensor:
    return torch.randint(3, 1000, (1, length))


def all_of(length: int) -> Tensor:
    """An attention mask. Without it transformers looks for packed sequences, by an operation OpenVINO does not have."""
    return torch.ones(1, length, dtype=torch.int64)


def transformers_networks() -> None:
    import transformers as hf

    def network(name: str, task: str, build: Callable[[], tuple[Any, ...]]) -> None:
        NETWORKS[name] = Task(task, "transformers", build)

    def text(name: str, build: Callable[[], nn.Module]) -> None:
        network(name, "text", lambda: (build(), {"input_ids": tokens(), "attention_mask": all_of(64)}))

    def image(name: str, task: str, build: Callable[[], nn.Module], size: int = 128) -> None:
        network(name, task, lambda: (build(), {"pixel_values": pixels(size)}))

    causal = hf.AutoModelForCausalLM.from_config
    place = {"max_position_embeddings": 128}
    queries = {"num_key_value_heads": 2, **WORDS, **WIDTH, **place}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 384}
    bert = {k: v for k, v in WORDS.items() if k in ("vocab_size", "pad_token_id")}
    text("BERT", lambda: hf.BertForSequenceClassification(hf.BertConfig(**WIDTH, **bert, **place)))
    text("DeBERTa-v2", lambda: hf.DebertaV2ForSequenceClassification(hf.DebertaV2Config(
        relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=16, **WIDTH, **bert,
        **place)))  # fmt: skip
    text("GPT-2", lambda: causal(hf.GPT2Config(n_embd=192, n_layer=4, n_head=6, n_positions=128, **WORDS)))
    text("Llama", lambda: causal(hf.LlamaConfig(**queries)))
    text("Qwen3", lambda: causal(hf.Qwen3Config(head_dim=32, **queries)))
    text("Mixtral", lambda: causal(hf.MixtralConfig(num_local_experts=4, num_experts_per_tok=2, **queries)))
    text("Qwen3-MoE", lambda: causal(hf.Qwen3MoeConfig(head_dim=32, **experts, **queries)))
    network("T5", "text", lambda: (
        hf.T5ForConditionalGeneration(hf.T5Config(
            vocab_size=1000, d_model=192, d_kv=32, d_ff=768, num_layers=3, num_heads=6, decoder_start_token_id=0)),
        {"input_ids": tokens(), "decoder_input_ids": tokens(16),
         "decoder_attention_mask": all_of(16)}))  # fmt: skip

    both = {"d_model": 192, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 6,
            "decoder_attention_heads": 6, "encoder_ffn_dim": 768, "decoder_ffn_dim": 768}  # fmt: skip
    network("Whisper", "speech", lambda: (
        hf.WhisperForConditionalGeneration(hf.WhisperConfig(
            num_mel_bins=80, max_source_positions=100, max_target_positions=64, decoder_start_token_id=1, **WORDS,
            **both)),
        {"input_features": torch.randn(1, 80, 200), "decoder_input_ids": tokens(16),
         "decoder_attention_mask": all_of(16)}))  # fmt: skip
    network("Wav2Vec2", "speech", lambda: (
        hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(
            vocab_size=32, conv_dim=(128,) * 4, conv_kernel=(10, 3, 3, 3), conv_stride=(5, 2, 2, 2),
            num_conv_pos_embeddings=32, num_conv_pos_embedding_groups=8, **WIDTH)),
        {"input_values": torch.randn(1, 8000)}))  # fmt: skip

    patches = {"image_size": 128, "patch_size": 16, **WIDTH}
    stages = {"depths": [2, 2, 2, 2], "hidden_sizes": [32, 64, 160, 256]}
    image("ViT", "classification", lambda: hf.ViTForImageClassification(hf.ViTConfig(**patches)))
    image("Swin", "classification", lambda: hf.SwinForImageClassification(hf.SwinConfig(
        embed_dim=48, depths=[2, 2, 2], num_heads=[3, 6, 12], window_size=4, image_size=128)))  # fmt: skip
    image("SegFormer", "segmentation", lambda: hf.SegformerForSemanticSegmentation(hf.SegformerConfig(
        num_attention_heads=[1, 2, 5, 8], decoder_hidden_size=128, **stages)))  # fmt: skip
    image("YOLOS", "detection", lambda: hf.YolosForObjectDetection(hf.YolosConfig(
        **{**patches, "image_size": [128, 128]}, num_detection_tokens=20)))  # fmt: skip
    image("Depth Anything", "depth", lambda: hf.DepthAnythingForDepthEstimation(hf.DepthAnythingConfig(
        backbone_config=hf.Dinov2Config(
            hidden_size=192, num_hidden_layers=4, num_attention_heads=6, image_size=126, patch_size=14,
            out_indices=[1, 2, 3, 4], apply_layernorm=True, reshape_hidden_states=False),
        reassemble_hidden_size=192, neck_hidden_sizes=[24, 48, 96, 192], fusion_hidden_size=64, patch_size=14)),
        126)  # fmt: skip
    names = ["stage1", "stage2", "stage3", "stage4"]
    resnet = hf.ResNetConfig(embedding_size=32, layer_type="basic", out_features=names, **stages)
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_queries": 20, "d_model": 64}
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256}
    image("DETR", "detection", lambda: hf.DetrForObjectDetection(hf.DetrConfig(
        backbone_config=resnet, **NAMED, **heads, **layers)))  # fmt: skip
    image("Deformable DETR", "detection", lambda: hf.DeformableDetrForObjectDetection(hf.DeformableDetrConfig(
        backbone_config=resnet, **NAMED, **heads, **layers)))  # fmt: skip
    real_time = {"encoder_hidden_dim": 64, "encoder_in_channels": [64, 160, 256], "encoder_ffn_dim": 256, "d_model": 64,
                 "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_queries": 30, "num_denoising": 0,
                 "decoder_in_channels": [64] * 3, "decoder_ffn_dim": 256, "decoder_layers": 2, "backbone": None,
                 "use_pretrained_backbone": False}  # fmt: skip
    image("RT-DETR", "detection", lambda: hf.RTDetrForObjectDetection(hf.RTDetrConfig(
        backbone_config=hf.RTDetrResNetConfig(
            embedding_size=32, layer_type="basic", out_features=names[1:], **stages),
        **real_time)))  # fmt: skip
    hgnet = {"stem_channels": [3, 16, 32], "embedding_size": 32, "stage_in_channels": [32, 64, 128, 256],
             "stage_mid_channels": [16, 32, 64, 64], "stage_out_channels": [64, 128, 256, 512],
             "stage_num_blocks": [1, 1, 1, 1], "stage_downsample": [False, True, True, True],
             "stage_light_block": [False, False, True, True], "stage_kernel_size": [3, 3, 5, 5],
             "stage_numb_of_layers": [3] * 4, "hidden_sizes": [64, 128, 256, 512], "depths": [1] * 4}  # fmt: skip
    image("D-FINE", "detection", lambda: hf.DFineForObjectDetection(hf.DFineConfig(
        backbone_config=hf.HGNetV2Config(out_features=names[1:], **hgnet), decoder_n_points=[3, 3, 3],
        **{**real_time, "encoder_in_channels": [128, 256, 512]})))  # fmt: skip
    swin = {"embed_dim": 48, "depths": [2, 2, 2, 2], "num_heads": [3, 6, 12, 24], "window_size": 4, "image_size": 128}
    image("Mask2Former", "segmentation", lambda: hf.Mask2FormerForUniversalSegmentation(hf.Mask2FormerConfig(
        backbone_config=hf.SwinConfig(out_features=names, **swin), feature_size=64, mask_feature_size=64,
        hidden_dim=64, encoder_feedforward_dim=128, encoder_layers=2, decoder_layers=3, num_attention_heads=4,
        dim_feedforward=256, num_queries=20)))  # fmt: skip
    vision = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6, "image_size": 128, "patch_size": 16}
    sam = {"output_channels": 64, "mlp_dim": 768, "window_size": 4, "global_attn_indexes": [1, 3], "num_pos_feats": 32}
    network("SAM encoder", "segmentation", lambda: (
        hf.SamModel(hf.SamConfig(vision_config={**vision, **sam})).vision_encoder, pixels(128)))  # fmt: skip
    clip = {"projection_dim": 128, "intermediate_size": 768}
    network("CLIP", "pictures and text", lambda: (
        hf.CLIPModel(hf.CLIPConfig(
            text_config={**WORDS, **WIDTH, **clip, "max_position_embeddings": 77},
            vision_config={**vision, **clip}, projection_dim=128)),
        {"input_ids": tokens(77), "pixel_values": pixels(128)}))  # fmt: skip
    frames = {"num_frames": 8, **patches}
    network("VideoMAE", "video", lambda: (
        hf.VideoMAEForVideoClassification(hf.VideoMAEConfig(**{**frames, "image_size": 64})),
        {"pixel_values": torch.rand(1, 8, 3, 64, 64)}))  # fmt: skip


# -- written here ---------------------------------------------------------------------------------------------------


class NnUNet(nn.Module):
    """As nnU-Net plans them: two convolutions a stage, InstanceNorm, leaky ReLU, strides, deep supervision in training.

    :param dims: 2 or 3.
    :param width: channels of the first stage.
    """

    def __init__(self, dims: int, width: int, classes: int = 4, stages: int = 5) -> None:
        super().__init__()
        conv, up, norm = (getattr(nn, f"{kind}{dims}d") for kind in ("Conv", "ConvTranspose", "InstanceNorm"))

        def stage(i: int, o: int, stride: int = 1) -> nn.Sequential:
            pair = [conv(i, o, 3, stride, 1), norm(o, affine=True), nn.LeakyReLU(0.01)]
            return nn.Sequential(*pair, conv(o, o, 3, 1, 1), norm(o, affine=True), nn.LeakyReLU(0.01))

        widths = [min(width * 2**i, 320) for i in range(stages)]
        falling = widths[::-1]
        self.down = nn.ModuleList(stage(i, o, 1 if i == 1 else 2) for i, o in zip([1, *widths], widths, strict=False))
        self.up = nn.ModuleList(up(i, o, 2, 2) for i, o in itertools.pairwise(falling))
        self.join = nn.ModuleList(stage(2 * o, o) for o in falling[1:])
        self.heads = nn.ModuleList(conv(o, classes, 1) for o in falling[1:])

    def forward(self, x: Tensor) -> Any:
        skips, outputs = [], []
        for down in self.down:
            x = down(x)
            skips.append(x)
        for up, join, head, skip in zip(self.up, self.join, self.heads, skips[-2::-1], strict=True):
            x = join(torch.cat([up(x), skip], 1))
            if self.training or head is self.heads[-1]:
                outputs.append(head(x))
        return outputs if self.training else outputs[-1]


class Recogniser(nn.Module):
    """A text recogniser: convolutions, a bidirectional LSTM over columns, letters."""

    def __init__(self) -> None:
        super().__init__()
        widths = [3, 32, 64, 128]
        self.features = nn.Sequential(*(
            nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d((2, 1)))
            for i, o in itertools.pairwise(widths)
        ), nn.AdaptiveAvgPool2d((1, None)))  # fmt: skip
        self.lstm = nn.LSTM(128, 96, bidirectional=True, batch_first=True)
        self.letters = nn.Linear(192, 40)

    def forward(self, x: Tensor) -> Tensor:
        return self.letters(self.lstm(self.features(x).squeeze(2).transpose(1, 2))[0])


class Encoder(nn.Module):
    """``nn.TransformerEncoder`` on patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 192, 16, 16)
        layer = nn.TransformerEncoderLayer(192, 6, 768, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), nn.Linear(192, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


def own_networks() -> None:
    def network(name: str, task: str, build: Callable[[], tuple[Any, ...]]) -> None:
        NETWORKS[name] = Task(task, "written here", build)

    network("nnU-Net-like, 2D", "segmentation", lambda: (NnUNet(2, 32), torch.rand(2, 1, 128, 128)))
    network("nnU-Net-like, 3D", "segmentation", lambda: (NnUNet(3, 16, stages=4), torch.rand(1, 1, 32, 32, 32)))
    network("CRNN", "text in pictures", lambda: (Recogniser(), torch.rand(2, 3, 32, 128)))
    network("nn.TransformerEncoder", "classification", lambda: (Encoder(), pixels(128, 2)))


for _add in (ultralytics_networks, transformers_networks, own_networks, torchvision_networks):
    _add()
