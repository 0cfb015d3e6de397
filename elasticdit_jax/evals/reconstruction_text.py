"""The reconstruction report as files: report.json, report.md in the layout of Tables 3 and 5, images/crops.png."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from elasticdit_jax.evals import pictures, report, report_text

# Field -> head of its column and how it is written; columns without a value in any row are left out.
_QUALITY = {
  "psnr": ("PSNR ↑", "{:.2f}"),
  "ssim": ("SSIM ↑", "{:.4f}"),
  "distance": ("weight-free distance ↓", "{:.4f}"),
  "lpips": ("LPIPS ↓", "{:.4f}"),
}
_COST = {
  "tflops": ("TFLOPs at 1024 px", "{:.3f}"),
  "tflops_true": ("with attention", "{:.3f}"),
  "parameters": ("parameters", "{:,.0f}"),
  "ms_encode": ("ms encode", "{:.1f}"),
  "ms_decode": ("ms decode", "{:.1f}"),
}
CROPS = "images/crops.png"
_NONE = "–"


def write(
  workdir: str | os.PathLike, result: Mapping[str, Any], crops: tuple[Sequence[str], Mapping[str, Any]]
) -> None:
  """Writes the three files.

  Args:
    workdir: is created.
    result: vaes (name -> field -> number), pictures (names and sizes), notes and config.
    crops: names of pictures, and row -> uint8 [N, S, S, 3].
  """
  os.makedirs(os.path.join(workdir, "images"), exist_ok=True)
  names, rows = crops
  # Enlarged by whole numbers: interpolation would hide what is compared.
  side = next(iter(rows.values())).shape[1]
  zoom = max(1, round(128 / side))
  larger = {name: np.repeat(np.repeat(row, zoom, 1), zoom, 2) for name, row in rows.items()}
  pictures.save_png(os.path.join(workdir, CROPS), pictures.grid(names, larger))
  whole = report.plain({"format": 1, "created": report.now(), "environment": report.environment()} | dict(result))
  report.write_text(os.path.join(workdir, "report.json"), json.dumps(whole, indent=1, allow_nan=False) + "\n")
  report.write_text(os.path.join(workdir, "report.md"), render(whole))


def render(result: Mapping[str, Any]) -> str:
  """report.md of what report.json holds."""
  where, rows = result["environment"], result["vaes"]
  sections = [
    "# Reconstruction by VAEs",
    f"{result['created']} · {where['device_count']} x {where['device']}, {where['cores']} cores, load"
    f" {where['load']:.1f} · jax {where['jax']}, Python {where['python']}, elasticdit_jax {where['version']}",
    f"Means over {len(result['pictures'])} pictures rounded to 256 levels: {', '.join(result['pictures'])}.",
    "## Quality (layout of Table 3)",
    table(rows, _QUALITY),
    "## Quality and cost (layout of Table 5)",
    table(rows, _COST | _QUALITY),
    "TFLOPs: encoder and decoder, 2 per multiply-accumulate; the paper's count leaves the products of attention out."
    " Milliseconds: one picture, the first of the list, median. The weight-free distance (Haar bands, blurred colours,"
    " SSIM) is no LPIPS.",
    f"![The busiest window of each picture]({CROPS})",
    *(["## Notes", "\n".join(f"- {note}" for note in result["notes"])] if result["notes"] else []),
  ]
  return "\n\n".join(sections) + "\n"


def table(rows: Mapping[str, Mapping[str, float]], columns: Mapping[str, tuple[str, str]]) -> str:
  """A Markdown table: one row per VAE, one column per field that any row has."""
  used = [field for field in columns if any(field in row for row in rows.values())]
  body = [
    [name, *(_NONE if row.get(field) is None else columns[field][1].format(row[field]) for field in used)]
    for name, row in rows.items()
  ]
  return report_text.table(["VAE", *(columns[field][0] for field in used)], body)
