"""The labelling page: people compare answers in a browser, and the store keeps what they say. Starts without torch.

queue       which comparison a rater is lent next; what becomes of the answer
agreement   how far raters agree with each other, with themselves, and with known answers
accounts    who may sign in, and who is signed in
text        what models wrote, as HTML that is safe to show
app         the pages
"""
