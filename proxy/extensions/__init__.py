"""Extensions: the protocols that packages of others keep, and what finds, loads and contains them."""
