"""lnr-prune's own adapters, registered when the entry point is loaded, like a third party's."""

from lnr_adapters.attention import Attention
from lnr_adapters.columns import Columns
from lnr_adapters.columns_bias import ColumnsBias
from lnr_adapters.conv_filters import ConvFilters
from lnr_adapters.fc_after_conv import FcAfterConv
from lnr_prune.calibration.adapter import register

__all__ = ["Attention", "Columns", "ColumnsBias", "ConvFilters", "FcAfterConv"]

for adapter in (Columns(), ColumnsBias(), FcAfterConv(), ConvFilters(), Attention()):
    register(adapter)
