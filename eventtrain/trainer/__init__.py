"""``Trainer`` and what runs it: sessions, fit, resume, evaluation."""
