"""The method's equations as functions of tensors."""
