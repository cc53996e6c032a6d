"""Which labels are wrong? One weight a training example, learned on clean validation examples."""
