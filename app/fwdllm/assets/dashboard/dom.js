export const $ = (id) => document.getElementById(id);

// Writing only what changed keeps screen readers from hearing the same status again.
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function show(element, visible) {
  element.hidden = !visible;
}

export function setError(element, message) {
  setText(element, message ?? "");
  show(element, Boolean(message));
}

export function option(value, text) {
  const element = document.createElement("option");
  element.value = value;
  element.textContent = text;
  return element;
}
