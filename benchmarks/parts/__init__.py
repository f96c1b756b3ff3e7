"""Parts of the suite, one module each: ``figures(device, budget_s, quick)`` returns its figures."""
