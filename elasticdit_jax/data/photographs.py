"""Real photographs without a download: those that scikit-image and scikit-learn ship in their wheels.

They are free to use (public domain or Creative Commons; each package lists the sources beside the files). Needs
`pip install "elasticdit_jax[photographs]"`; only the files are read, neither package is imported.
"""

import importlib.util
import os

_FILES = {
  "astronaut": ("skimage", "data/astronaut.png"),
  "cat": ("skimage", "data/chelsea.png"),
  "coffee": ("skimage", "data/coffee.png"),
  "motorcycle": ("skimage", "data/motorcycle_left.png"),
  "rocket": ("skimage", "data/rocket.jpg"),
  "china": ("sklearn", "datasets/images/china.jpg"),
  "flower": ("sklearn", "datasets/images/flower.jpg"),
}


def photographs() -> dict[str, str]:
  """Name -> file of each photograph, in colour, shorter side 300 to 512 pixels.

  Raises:
    ValueError: where a package or a file in it is missing, with the command that installs them.
  """
  found = {name: os.path.join(_folder(package), file) for name, (package, file) in _FILES.items()}
  missing = [name for name, path in found.items() if not os.path.isfile(path)]
  if missing:
    raise ValueError(
      f"photographs: {', '.join(missing)} not found among the installed packages; get them with"
      ' pip install "elasticdit_jax[photographs]"'
    )
  return found


def _folder(package: str) -> str:
  spec = importlib.util.find_spec(package)
  return next(iter(spec.submodule_search_locations or ()), "") if spec else ""
