"""``Trainer`` and what it is made of: sessions, fit, resume, evaluation and prediction."""
