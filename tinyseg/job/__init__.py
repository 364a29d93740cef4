"""The main job: from a folder of scans to a trained network and its scores."""
