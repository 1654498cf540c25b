"""Views of the packaged photos."""

import numpy as np

from effnet.arch.spec import InputSpec
from effnet.data.views import views


def test_views_differ_and_are_always_the_same() -> None:
    input_spec = InputSpec(size=32, resize=32)
    found = views(input_spec, 9)
    assert (found.shape, found.dtype) == ((9, 32, 32, 3), np.uint8)
    assert np.array_equal(found, views(input_spec, 9))
    assert len({view.tobytes() for view in found}) == 9
    assert views(input_spec.with_channels(1), 2).shape == (2, 32, 32, 1)
    assert views(input_spec.with_channels(5), 2).shape == (2, 32, 32, 5)
