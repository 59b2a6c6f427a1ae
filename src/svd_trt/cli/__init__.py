"""The command line: ``svd-trt build``, ``svd-trt infer`` and their kin."""
