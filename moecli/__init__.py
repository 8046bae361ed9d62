"""moecli: smaller Mixture-of-Experts models from a recipe.

`import moecli` registers the loader of compact checkpoints as soon as transformers is imported too;
it imports neither torch nor transformers by itself.
"""

from moecli.runtime.quantizer import register_when_transformers_loads

__version__ = "0.1.0"

register_when_transformers_loads()
