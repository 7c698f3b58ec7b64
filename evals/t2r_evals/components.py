"""Does each component of a hybrid contribute? Each is switched off in turn, and the same text is read again.

A hybrid can look fine because its softmax layers or its window do all the work while the recurrent path idles; nothing
but switching the path off shows it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from t2r_evals.compare import paired_interval
from t2r_evals.schema import ComponentResult, LanguageResult


@contextmanager
def switched_off(modules: Sequence[Any]) -> Iterator[None]:
    """Within the block the modules add nothing to the residual stream: their output (its first element, where it is a
    tuple) is zero."""

    def zero(module: Any, arguments: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] * 0, *output[1:])
        return output * 0

    handles = [module.register_forward_hook(zero) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def measure_components(
    components: Mapping[str, Sequence[Any]], whole: LanguageResult, read: Callable[[], LanguageResult]
) -> list[ComponentResult]:
    """Loss without each component.

    Args:
        components: modules by the name of the component that they form.
        whole: what the complete model made of the text.
        read: measures the model again on the same text.
    """
    results = []
    for name, modules in components.items():
        with switched_off(modules):
            without = read()
        difference, low, high = paired_interval(np.array(without.window_losses) - np.array(whole.window_losses))
        results.append(
            ComponentResult(
                component=name,
                modules=len(modules),
                loss=without.loss,
                far_repeat_loss=without.far_repeat_loss,
                difference=difference,
                low=low,
                high=high,
            )
        )
    return results
