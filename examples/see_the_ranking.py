"""What a ranker thinks of a photo, and what stays of it, as one picture."""

import sys
from pathlib import Path

import timm
from PIL import Image
from skimage import data

import ltrp_timm  # registers the models
from ltrp_timm import visualize

out = Path(sys.argv[1] if len(sys.argv) > 1 else "ranking.png")
photo = Image.fromarray(data.chelsea())

rows = []
for ranker in ("contrast", "random"):
    model = timm.create_model("ltrp_vit_tiny", ranker=ranker).eval()
    rows.append(visualize.overview(photo, model, keep_ratios=(0.7, 0.5, 0.25)))

sheet = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)))
for index, row in enumerate(rows):
    sheet.paste(row, (0, index * row.height))
sheet.save(out)
print(f"{out.name}: rows are contrast and random; {', '.join(ltrp_timm.list_rankers())} exist")
