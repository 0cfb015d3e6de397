"""Scores, validation losses, costs and pictures of every route of a model; or the pictures of a published benchmark.

    python -m elasticdit_jax.main --config=configs/evaluate.py
    ... --config.checkpoint=runs/uwco --workdir=runs/evaluate-uwco

Writes runs/evaluate/report.md, report.json and images/routes.png. A model of your own pictures has losses, costs and
pictures but no scores: --config.data.source=folder --config.data.path=DIR names the pictures it was trained on.

About two minutes on two idle CPU cores: 480 pictures for each of four routes, and the compilation of their programs.

    :debug           two routes, few prompts and steps, under 90 s with compilation

    :geneval         553 prompts x 4; --config.prompts=evaluation_metadata.jsonl of github.com/djghosh13/geneval
    :hpsv2           3200 x 1; --config.prompts=DIR with anime.json, concept-art.json, paintings.json, photo.json
    :dpg             1065 x 4; --config.prompts=dpg_bench/prompts of github.com/TencentQQGYLab/ELLA
    :t2i_compbench   2400 x 10; --config.prompts=examples/dataset of github.com/Karine-Huang/T2I-CompBench
    :geneval,debug   and so on: twelve captions of the embedded world in that layout, under 90 s
    :tables          --config.runs=runs/a,runs/b: the results of several benchmarks in the layout of the paper's tables

A benchmark is drawn along every route into WORKDIR/<route>, laid out for its evaluator, whose command is printed at the
end; once its results are there, the same command again writes tables.md. Interrupted, the same command goes on; on
several hosts each draws its share. The model must know the words of the prompts. --config.models=hps_v2=DIR (also
clip_score, pick_score) scores the pictures here, with weights that you have.

    :vae         what VAEs lose and cost, in the layout of Tables 3 and 5, on the photographs that scikit-image and
                 scikit-learn ship (pip install "elasticdit_jax[photographs]"); under a minute on two idle CPU cores
    :vae,debug   on scenes, without either
    ... --config.vaes=shipped,DIR --config.images=DIR --config.size=0    any VAEs, any folder, every picture's own size
    ... --config.lpips=FILE    LPIPS, with your VGG16 weights as safetensors; a wrong path says how to make the file
"""

from ml_collections import ConfigDict

from elasticdit_jax.configs import common

_BENCHMARKS = ("geneval", "hpsv2", "dpg", "t2i_compbench")


def get_config(arg: str = "") -> ConfigDict:
  args = common.parse_arg(arg, debug=False, tables=False, vae=False, **dict.fromkeys(_BENCHMARKS, False))
  modes = (*_BENCHMARKS, "tables", "vae")
  chosen = [name for name in modes if args[name]]
  if len(chosen) > 1:
    raise ValueError(f"expected at most one of {', '.join(modes)} after the colon, got {arg!r}")
  if args.vae:
    return _vae(args.debug)
  config = ConfigDict()
  config.task = "evaluate"
  if chosen == ["tables"]:
    config.runs = ""
    return config.lock()
  config.checkpoint = ""
  config.routes = "max-f8,lite-f16" if args.debug else "all"
  config.steps = 4 if args.debug else 20
  config.guidance = 3.0
  config.seed = 0
  config.solver = "euler"
  if chosen:
    config.benchmark = chosen[0]
    config.prompts = "scenes" if args.debug else ""
    config.count = 0
    config.size = 0
    config.batch_size = 16
    config.models = ""
    return config.lock()
  config.per_task = 1 if args.debug else 40
  config.pictures = 8
  config.validation = 8 if args.debug else 128
  config.repeats = 3 if args.debug else 5
  config.data = common.scenes_data(seed=0, size=0, batch_size=1)
  return config.lock()


def _vae(debug: bool) -> ConfigDict:
  config = ConfigDict()
  config.task = "evaluate"
  config.vaes = "shipped"
  config.images = "scenes" if debug else "photographs"
  config.size = 64 if debug else 256
  config.count = 4 if debug else 0
  config.crop = 64
  config.lpips = ""
  config.repeats = 1 if debug else 5
  return config.lock()
