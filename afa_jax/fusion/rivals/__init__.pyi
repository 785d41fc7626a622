from .blending import MagicFusion as MagicFusion
from .blending import NoiseAverage as NoiseAverage
from .block_weights import BlockWeights as BlockWeights
from .gate import Gate as Gate
from .maxfusion import MaxFusion as MaxFusion
from .router import Router as Router
from .superdiff import SuperDiff as SuperDiff
from .time_experts import TimeExperts as TimeExperts
