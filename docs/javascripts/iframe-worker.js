// Search runs in a worker, which browsers refuse to pages opened as files: there, a hidden frame takes its place.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.waiting = [];
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      const inside = frame.contentWindow;
      inside.document.open();
      inside.document.write(
        "<script>var __posted = (data) => parent.__answered(window, data);" +
          "window.postMessage = (data) => __posted(data);" +
          "window.importScripts = (...urls) => urls.reduce((before, url) => before.then(() =>" +
          "new Promise((done) => { const s = document.createElement('script'); s.src = url;" +
          "s.onload = done; document.body.append(s); })), Promise.resolve());" +
          "</scr" + "ipt><body></body>"
      );
      inside.document.close();
      const answer = window.__answered;
      window.__answered = (source, data) => {
        if (source === inside) {
          this.dispatchEvent(new MessageEvent("message", { data }));
          if (this.onmessage) this.onmessage(new MessageEvent("message", { data }));
        } else if (answer) answer(source, data);
      };
      const script = inside.document.createElement("script");
      script.src = url;
      script.onload = () => {
        this.inside = inside;
        this.waiting.splice(0).forEach((data) => this.postMessage(data));
      };
      inside.document.body.append(script);
    }
    postMessage(data) {
      if (this.inside) this.inside.dispatchEvent(new MessageEvent("message", { data }));
      else this.waiting.push(data);
    }
    terminate() {}
  };
}
