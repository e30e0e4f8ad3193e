// Small helpers for the elements of the page.

export const $ = (selector) => document.querySelector(selector);

export function make(name, properties = {}, ...children) {
  const { attributes = {}, ...rest } = properties;
  const element = Object.assign(document.createElement(name), rest);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

export function fillSelect(select, options, chosen) {
  select.replaceChildren(...options.map(([value, text]) => make("option", { value, textContent: text })));
  if (options.some(([value]) => value === chosen)) select.value = chosen;
}

// Say something to screen readers.
export function say(text) {
  $("#said").textContent = text;
}

export function problem(text) {
  $("#problem").hidden = !text;
  $("#problem").textContent = text ?? "";
}
