"""eldr's decode policies in NVIDIA Dynamo. Only `component.py` imports Dynamo."""
