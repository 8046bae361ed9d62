"""Where a model keeps its experts. Knows nothing of compression."""

from moecli.families.family import (
    ALIAS_KEY,
    FACTORED,
    FACTORED_HINT,
    FAMILIES,
    WIDTHS_KEY,
    Family,
    Linear,
    accounting,
    alias_config,
    expert_forward,
    facts_of,
    family_of,
    keep_problem,
    linears_of,
    one_group,
)
from moecli.families.packing import form_of
from moecli.families.routing import RouteRule, Routing, route
from moecli.families.sketch import forecast_alias, forecast_keep, forecast_row_drop
from moecli.families.widths import (
    forecast_width,
    forecast_widths,
    padded,
    width_config,
    width_problem,
    widths_config,
    widths_problem,
)

__all__ = [
    "ALIAS_KEY",
    "FACTORED",
    "FACTORED_HINT",
    "FAMILIES",
    "WIDTHS_KEY",
    "Family",
    "Linear",
    "RouteRule",
    "Routing",
    "accounting",
    "alias_config",
    "expert_forward",
    "facts_of",
    "family_of",
    "forecast_alias",
    "forecast_keep",
    "forecast_row_drop",
    "forecast_width",
    "forecast_widths",
    "form_of",
    "keep_problem",
    "linears_of",
    "one_group",
    "padded",
    "route",
    "width_config",
    "width_problem",
    "widths_config",
    "widths_problem",
]
