// Filters a table of many rows by paper, verdict and words; without a script the whole table stands there.
document.querySelectorAll(".filter").forEach((box) => {
  const matches = (value, wanted) => (wanted[0] === "!" ? value !== wanted.slice(1) : value === wanted);
  const plain = (text) => text.toLowerCase().replaceAll("-", ""); // cifar10 finds CIFAR-10
  const rows = [...document.querySelectorAll("#" + box.dataset.table + " tbody tr")];
  const choices = ["paper", "verdict"].map((name) => {
    const select = document.createElement("select");
    select.name = name;
    select.setAttribute("aria-label", name);
    select.add(new Option("every " + name, ""));
    if (name === "verdict") select.add(new Option("attempted", "!not attempted"));
    [...new Set(rows.map((row) => row.dataset[name]))].forEach((value) => select.add(new Option(value)));
    return select;
  });
  const words = document.createElement("input");
  words.type = "search";
  words.placeholder = "words, e.g. cifar10";
  const count = document.createElement("span");
  const show = () => {
    const wanted = plain(words.value).split(/\s+/);
    let shown = 0;
    rows.forEach((row) => {
      const text = plain(row.textContent);
      row.hidden =
        choices.some((select) => select.value && !matches(row.dataset[select.name], select.value)) ||
        !wanted.every((word) => text.includes(word));
      shown += !row.hidden;
    });
    count.textContent = shown + " of " + rows.length;
  };
  [...choices, words].forEach((control) => control.addEventListener("input", show));
  box.append(...choices, words, count);
  show();
});
