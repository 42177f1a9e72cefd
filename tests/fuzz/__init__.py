"""Hostile input at every door: messages of the internal channels, bytes at every socket, requests over HTTP."""
