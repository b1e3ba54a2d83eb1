"""Every error that gemma_hub raises on purpose.

GemmaHubError
├── ConfigError (ValueError)                a config.json value or key is wrong
├── CheckpointError (ValueError)            a checkpoint's files or tensors are wrong
│   ├── CheckpointNotFoundError (+ FileNotFoundError)
│   └── VerificationError                   a model does not compute what its probe says
├── TokenizerError (ValueError)             a vocabulary is unusable, or cannot encode a text
├── InputError (ValueError)                 an argument of a call is wrong: shape, id, setting
│   └── CapacityError                       past the cache's capacity, the positions or the memory
├── BackendNotFoundError (LookupError)      no backend of that name, or two that claim it
├── PluginError (ImportError)               the plug-in is there and cannot be loaded
└── UnsupportedFeature (NotImplementedError) the backend does not do this, and says so

NewHeadWarning (UserWarning) is the one warning: a head that no checkpoint had was made.
Each leaf also inherits the builtin that a caller would expect, so either can be caught.
A message says what is wrong with the value, what was expected, and what to do.
"""

import difflib
from collections.abc import Iterable


class GemmaHubError(Exception):
    """The root: catch this to catch everything that gemma_hub raises on purpose."""


class ConfigError(GemmaHubError, ValueError):
    """A value or a key of a model configuration is wrong."""


class CheckpointError(GemmaHubError, ValueError):
    """The files or the tensors of a checkpoint are wrong."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no checkpoint where one was asked for."""


class VerificationError(CheckpointError):
    """A model does not compute what the probe beside its weights says."""


class TokenizerError(GemmaHubError, ValueError):
    """A vocabulary cannot be used, or a text cannot be encoded with it."""


class InputError(GemmaHubError, ValueError):
    """An argument of a call is wrong: a shape, a token id, a setting."""


class CapacityError(InputError):
    """A call would go past the cache's capacity, the model's position limit or the free memory."""


class BackendNotFoundError(GemmaHubError, LookupError):
    """There is no usable backend of that name."""


class PluginError(GemmaHubError, ImportError):
    """A plug-in is installed and cannot be loaded."""


class UnsupportedFeature(GemmaHubError, NotImplementedError):
    """A backend was asked for something that it does not do.

    Attributes:
        feature: name of the feature, as in `gemma_hub.backend.FEATURES`.
        backend: name of the backend.
    """

    def __init__(self, feature: str, backend: str, advice: str = "") -> None:
        self.feature = feature
        self.backend = backend
        super().__init__(f"Backend {backend!r} does not support {feature!r}. {advice}".rstrip())


class NewHeadWarning(UserWarning):
    """A model was given a head that no checkpoint had; it knows nothing before it is trained."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`Did you mean 'x'?` for the known name nearest to `name`, or an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"Did you mean {match[0]!r}?" if match else ""


def first_ten(names: Iterable[str]) -> str:
    """The first ten names, sorted, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - 10} more" if len(ordered) > 10 else ""
    return ", ".join(ordered[:10]) + more
