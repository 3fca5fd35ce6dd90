"""The demo model on trial: exams through the true server, its equality with transformers, and what docs show of it."""
