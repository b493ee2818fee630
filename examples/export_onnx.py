"""A pruned ViT as one ONNX file: written, checked, and run by onnxruntime without torch's model."""

import json
import tempfile
from pathlib import Path

import onnxruntime
import timm
import torch

import ltrp_timm

vit = timm.create_model("vit_tiny_patch16_224", img_size=96, depth=2, num_classes=10).eval()
model = ltrp_timm.drop_patches(vit, ranker="contrast", keep_ratio=0.5)

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "vit.onnx"
    exported = ltrp_timm.export_model(model, path, format="onnx", dynamic_batch=True)
    print(
        f"{path.stat().st_size / 1e6:.1f} MB; difference from the model {exported.parity.error:.1e}"
    )

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    about = json.loads(session.get_modelmeta().custom_metadata_map["ltrp_timm"])
    print(f"keeps {about['num_keep']} of {about['num_patches']} patches, ranker {about['ranker']}")
    print(f"wants {about['input_size']} with mean {about['mean']} and std {about['std']}")

    for batch_size in (1, 4):
        images = torch.randn(batch_size, *about["input_size"])
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        with torch.inference_mode():
            difference = (torch.from_numpy(logits) - model(images)).abs().max()
            to_full = (torch.from_numpy(logits) - vit(images)).abs().max()
        print(
            f"batch {batch_size}: {difference:.1e} from the model, {to_full:.1e} from the full ViT"
        )
        assert difference < 1e-4 < to_full
