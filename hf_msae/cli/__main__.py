"""`python -m hf_msae.cli`, which is what `accelerate launch -m hf_msae.cli` runs."""

from hf_msae.cli.main import main

main()
