"""The gradient laboratory: what backpropagation through time does to gradients, measured on a model of one's own."""

from gpurnn.diagnose.bias import Bias, clipping_bias, truncation_bias
from gpurnn.diagnose.decomposition import Decomposition, decompose
from gpurnn.diagnose.evidence import Evidence, GateValues
from gpurnn.diagnose.flow import Flow, gradient_flow
from gpurnn.diagnose.jacobians import Spans, jacobian_product, jacobians, lyapunov_exponents, singular_values
from gpurnn.diagnose.sensitivity import influence
from gpurnn.diagnose.spectrum import Spectrum, recurrent_spectrum
from gpurnn.diagnose.verdict import Verdict, clip_threshold, verdicts

__all__ = [
    "Bias",
    "Decomposition",
    "Evidence",
    "Flow",
    "GateValues",
    "Spans",
    "Spectrum",
    "Verdict",
    "clip_threshold",
    "clipping_bias",
    "decompose",
    "gradient_flow",
    "influence",
    "jacobian_product",
    "jacobians",
    "lyapunov_exponents",
    "recurrent_spectrum",
    "singular_values",
    "truncation_bias",
    "verdicts",
]
