"""What the model still does: probes, verdicts, intervals. It knows nothing of how the model was trained."""
