"""Where in a language model: name a site, capture the activations there, replace them."""

from hf_msae.sites.fitting import (
    check_width,
    find_output_site,
    find_site,
    recorded_output_site,
    recorded_site,
)
from hf_msae.sites.hooks import capture, check_layout, check_order, in_this_thread, replace, site_width
from hf_msae.sites.names import Site, SiteError, resolve_site

__all__ = [
    "Site",
    "SiteError",
    "capture",
    "check_layout",
    "check_order",
    "check_width",
    "find_output_site",
    "find_site",
    "in_this_thread",
    "recorded_output_site",
    "recorded_site",
    "replace",
    "resolve_site",
    "site_width",
]
