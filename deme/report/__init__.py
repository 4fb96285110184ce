"""What people look at: tables and model cards."""
