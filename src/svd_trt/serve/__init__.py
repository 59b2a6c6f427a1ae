"""Serving: a queue of videos that is kept on disk, the HTTP API over it, and the metrics. Needs the extra ``serve``."""
