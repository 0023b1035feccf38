"""Where in a language model: name a site, capture the activations there, replace them."""

from hf_msae.sites.hooks import capture, check_layout, in_this_thread, replace, site_width
from hf_msae.sites.names import Site, SiteError, resolve_site

__all__ = ["Site", "SiteError", "capture", "check_layout", "in_this_thread", "replace", "resolve_site", "site_width"]
