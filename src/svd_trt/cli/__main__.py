"""``python -m svd_trt.cli`` is ``svd-trt``."""

from svd_trt.cli.main import main

main()
