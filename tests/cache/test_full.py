CASES = {"full": ("full", {}, lambda row: row.attend(lambda i, j: j <= i))}
FIELDS = {}
