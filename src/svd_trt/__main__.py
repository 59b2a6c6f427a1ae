"""``python -m svd_trt`` is ``svd-trt``."""

from svd_trt.cli.main import main

main()
