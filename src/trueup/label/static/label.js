// Keys, and the time an answer took. Without it the page works too, by Tab, arrows and Enter.
"use strict";
document.documentElement.classList.add("script");
const began = Date.now();
const form = document.getElementById("answer");
const guideline = document.getElementById("guideline");

for (const button of document.querySelectorAll("[data-opens]")) {
  button.hidden = false;
  button.addEventListener("click", () => document.getElementById(button.dataset.opens).showModal());
}
form?.addEventListener("submit", (event) => {
  form.elements.seconds.value = ((Date.now() - began) / 1000).toFixed(1);
  if (form.dataset.sent) event.preventDefault(); // a second press while the first is under way
  form.dataset.sent = "yes";
});
window.addEventListener("pageshow", () => delete form?.dataset.sent);

const types = (e) => e.matches("textarea, select, input:not([type=radio]):not([type=checkbox])");

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.isComposing) return;
  const at = event.target;
  if (event.key === "Escape" && types(at)) return at.blur();
  if (guideline?.open) {
    if (event.key === "g") guideline.close();
    return;
  }
  if (types(at)) return;
  // Enter on what has a meaning of its own keeps it
  if (event.key === "Enter" && at.matches("a, button, summary")) return;
  const target = document.querySelector(`[data-key="${CSS.escape(event.key)}"]`);
  if (!target || target.hidden) return;
  event.preventDefault();
  if (target.type === "radio") {
    target.checked = true;
    target.focus();
  } else if (target.matches("summary")) {
    const details = target.parentElement;
    details.open = !details.open;
    (details.open ? details.querySelector("textarea, select, input") || target : target).focus();
  } else if (target.form === form && target.value === "keep") {
    form.requestSubmit(target);
  } else {
    target.click();
  }
});
