"""Serve a tree's paths with vLLM, each as a model of its own name.

server_args("zoo", cache="vllm-cache")     the flags and the environment of a server
register()                                 vLLM's entry point: the plugin of `plugin.py`
"""

from .plugin import register
from .settings import ServerArgs, server_args

__all__ = ["ServerArgs", "register", "server_args"]
