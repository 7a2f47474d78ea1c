"""What tests share: toys, builders, and programs that are run beside them."""
