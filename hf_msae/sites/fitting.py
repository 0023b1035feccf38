"""Whether an SAE fits a site of a language model: the one place that asks, for training, measuring, reading, steering.

An SAE's configuration records where it reads and how wide the activations there are. Both can be wrong for the model
at hand: another model was given, or another site. Whoever runs an SAE on a model asks here first.
"""

from transformers import PreTrainedModel

from hf_msae.errors import InputError
from hf_msae.modeling import MatryoshkaSAEConfig
from hf_msae.sites.hooks import check_order, site_width
from hf_msae.sites.names import Site, SiteError, resolve_site


def find_site(
    model: PreTrainedModel, config: MatryoshkaSAEConfig, site: str | Site | None = None, *, called: str = ""
) -> Site:
    """The site where an SAE reads a language model, which is found and measured there.

    Args:
        model: the language model, in evaluation mode.
        config: the SAE's.
        site: where in the model; by default what the configuration records.
        called: the SAE's name in errors.

    Returns:
        The site, with the path that it has in this model.

    Raises:
        SiteError: no site is given or recorded, the model has no such site, or its activations have another width
            than those that the SAE reads.
    """
    found = resolve_site(model, site or recorded_site(config, called=called))
    check_width(site_width(model, found), config, found, model, called=called)
    return found


def find_output_site(
    model: PreTrainedModel,
    config: MatryoshkaSAEConfig,
    site: Site,
    site_out: str | Site | None = None,
    *,
    called: str = "",
) -> Site:
    """The site whose activations are reconstructed: that of an SAE itself, and of a transcoder its other one.

    Args:
        model: the language model, in evaluation mode.
        config: of the SAE or transcoder.
        site: where it reads, as `find_site` gave it.
        site_out: where in the model a transcoder writes; by default what the configuration records.
        called: its name in errors.

    Returns:
        The site, with the path that it has in this model.

    Raises:
        SiteError: of a transcoder, as `find_site`; or where the model comes to the other site first, or has other
            tokens there.
    """
    if not config.is_transcoder:
        if site_out is not None:
            raise SiteError(f"{_name(called)} is no transcoder, so it takes no site_out; got {site_out}.")
        return site
    found = resolve_site(model, site_out or recorded_output_site(config, called=called))
    if found == site:
        raise SiteError(f"{_name(called)} reads and writes {site}: what reconstructs its own input needs no site_out.")
    check_width(site_width(model, found), config, found, model, called=called, output=True)
    check_order(model, site, found)
    return found


def recorded_site(config: MatryoshkaSAEConfig, *, called: str = "", error: type[InputError] = SiteError) -> str:
    """The site that an SAE's configuration records.

    Args:
        config: the SAE's.
        called: the SAE's name in errors.
        error: what is raised where it records none.
    """
    if config.site is None:
        raise error(
            f"{_name(called)} records no site, so it is not known where in the language model it reads. Give the site "
            "or set config.site, for example to 'layers.12'."
        )
    return config.site


def recorded_output_site(config: MatryoshkaSAEConfig, *, called: str = "", error: type[InputError] = SiteError) -> str:
    """The site whose activations are reconstructed, as a configuration records it: of an SAE that is its own.

    Args:
        config: of the SAE or transcoder.
        called: its name in errors.
        error: what is raised where it records none.
    """
    if not config.is_transcoder:
        return recorded_site(config, called=called, error=error)
    if config.site_out is None:
        raise error(
            f"{_name(called)} is a transcoder and does not record which activations it reconstructs. Give site_out, "
            "or set config.site_out, for example to 'layers.12.mlp'."
        )
    return config.site_out


def check_width(
    width: int,
    config: MatryoshkaSAEConfig,
    site: Site,
    model: PreTrainedModel,
    *,
    called: str = "",
    error: type[InputError] = SiteError,
    output: bool = False,
) -> None:
    """Check that activations are as wide as those that an SAE reads.

    Args:
        width: of the activations.
        config: the SAE's.
        site: where the activations are.
        model: in which language model.
        called: the SAE's name in errors.
        error: what is raised where the widths differ.
        output: the activations are those that a transcoder reconstructs.
    """
    wanted = config.output_size if output else config.hidden_size
    if width == wanted:
        return
    if output:
        remedy = f"Give another site_out, or make a transcoder with hidden_size_out={width}."
    else:
        remedy = (
            f"It was made for {config.site or 'an unrecorded site'} of {config.base_model or 'an unrecorded model'}: "
            f"give these, or make an SAE with hidden_size={width}."
        )
    raise error(
        f"{_name(called)} {'reconstructs' if output else 'reads'} activations of {wanted} dimensions, but those at "
        f"{site} of {model.config.name_or_path or 'the model'} have {width}. {remedy}"
    )


def _name(called: str) -> str:
    return f"The SAE {called}" if called else "The SAE"
