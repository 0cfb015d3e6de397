"""What the evaluators of the four benchmarks do with a folder, step by step, their networks left out.

Each returns the pictures it would judge, as (prompt or metadata, picture). Written from the evaluators' own loops
(evaluate_images.py; hpsv2/evaluation.py; compute_dpg_bench.py; BLIP_vqa.py and numeracy_eval.py), not from our code.
"""

import json
import os
import re

import numpy as np
from PIL import Image


def _pixels(path):
  with Image.open(path) as image:
    assert image.mode == "RGB", (path, image.mode)
    return np.asarray(image)


def geneval(root):
  judged = []
  for subfolder in os.listdir(root):
    folder = os.path.join(root, subfolder)
    if not os.path.isdir(folder) or not subfolder.isdigit():
      continue
    with open(os.path.join(folder, "metadata.jsonl")) as f:
      metadata = json.load(f)
    for name in os.listdir(os.path.join(folder, "samples")):
      path = os.path.join(folder, "samples", name)
      if os.path.isfile(path) and re.match(r"\d+\.png", name):
        for wanted in metadata.get("include", []):
          assert {"class", "count"} <= set(wanted), wanted
          if "position" in wanted:
            relation, target = wanted["position"]
            assert isinstance(relation, str) and "class" in metadata["include"][target]
        judged.append(((metadata["tag"], metadata["prompt"]), _pixels(path)))
  return judged


def hpsv2(root, meta_dir):
  judged = []
  for style in os.listdir(root):  # every entry is a style: anything else in there ends the evaluation
    with open(os.path.join(meta_dir, f"{style}.json")) as f:
      annotations = json.load(f)
    for index, caption in enumerate(annotations):
      judged.append((caption, _pixels(os.path.join(root, style, f"{index:05d}.jpg"))))
  return judged


def dpg(root, questions, resolution, pic_num=4):
  """questions: the item_ids of dpg_bench.csv."""
  judged = []
  for name in os.listdir(root):
    whole = Image.open(os.path.join(root, name))
    key = os.path.basename(name).split(".")[0]
    assert key in questions, key
    tiles = [(0, 0), (resolution, 0), (0, resolution), (resolution, resolution)][:pic_num]
    for left, top in tiles:
      assert left + resolution <= whole.width and top + resolution <= whole.height
      judged.append((key, np.asarray(whole.crop((left, top, left + resolution, top + resolution)))))
  return judged


def t2i_compbench(outpath):
  names = os.listdir(os.path.join(outpath, "samples"))
  names.sort(key=lambda x: int(x.split("_")[-1].split(".")[0]))
  judged = []
  for place, name in enumerate(names):
    # One evaluator numbers by place, another by the second part between underscores: they must agree.
    assert int(name.split(".png")[0].split("_")[1]) == place, (name, place)
    judged.append((name.split("_")[0], _pixels(os.path.join(outpath, "samples", name))))
  return judged
