"""What leaves a tuning run: tuned tensors, ledger, folders. No torch here: pages offer them too."""
