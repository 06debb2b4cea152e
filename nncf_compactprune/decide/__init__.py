"""Who goes: budgets and allocation, scopes, importance criteria. Nothing here changes a model."""
