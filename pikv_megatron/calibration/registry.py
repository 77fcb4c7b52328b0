"""What `launch/calibrate.py` fits: whatever is named here."""

from pikv_megatron.calibration.fits.base import LayerFit
from pikv_megatron.calibration.fits.expert_moments import ExpertMomentsFit
from pikv_megatron.calibration.fits.gate import GateFit
from pikv_megatron.calibration.fits.heads import HeadsFit
from pikv_megatron.calibration.fits.moments import MomentsFit
from pikv_megatron.calibration.fits.queries import QueriesFit
from pikv_megatron.calibration.fits.scorer import ScorerFit
from pikv_megatron.calibration.fits.visits import VisitsFit

FITS: tuple[type[LayerFit], ...] = (
    MomentsFit, ExpertMomentsFit, QueriesFit, HeadsFit, ScorerFit, GateFit, VisitsFit,
)
